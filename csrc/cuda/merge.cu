// merge_: weights[l] += sum over clients k of B_k diag(scale_k) A_k on a CUDA device, all layers in a launch.
//
// A block takes some tiles of one weight; the sums stay in registers over the ranks of all clients, gathered from the
// clients' own buffers, and meet the weight once. Every element adds its ranks in one order, so the same call gives the
// same bits. `list_ranks` first turns the table of clients into one of ranks and finds the powers of two that
// merge_tiles.cuh explains, where it needs them; for those it reads the right factors, which leaves them in the L2.
#include "../look_over.h"
#include "../ops.h"
#include "merge_tiles.cuh"
#include "written.cuh"

#include <algorithm>
#include <utility>

namespace flora {
namespace {

using namespace cuda;

constexpr int kListThreads = 128;

// One warp for each rank, those that fill up a step included.
__global__ void __launch_bounds__(kListThreads, 8) list_ranks(const Client* clients, int count, Rank* ranks, int64_t all) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kListThreads / 32) + threadIdx.x / 32;
  if (n >= all) return;
  const int lane = threadIdx.x % 32;
  const Client c = clients[owner(clients, count, n)];
  const int64_t k = n - c.begin;
  Rank rank = {};
  if (k < c.count) {
    rank.left = c.left + k * c.left_col;
    rank.right = c.right + k * c.right_row;
    rank.left_row = c.left_row;
    rank.right_col = c.right_col;
    rank.left_kind = static_cast<uint8_t>(c.left_kind);
    rank.right_kind = static_cast<uint8_t>(c.right_kind);
    rank.scale = *reinterpret_cast<const float*>(c.scale + k * c.scale_step);
    const int left_size = itemsize(c.left_kind), right_size = itemsize(c.right_kind);
    const int left_unit = min(16, 4 * left_size), right_unit = min(16, 4 * right_size);
    rank.left_quads = n % 4 == 0 && k + 4 <= c.count && c.left_col == left_size &&
                      ((reinterpret_cast<uintptr_t>(rank.left) | static_cast<uintptr_t>(c.left_row)) & (left_unit - 1)) == 0;
    rank.right_quads = c.right_col == right_size && (reinterpret_cast<uintptr_t>(rank.right) & (right_unit - 1)) == 0;
    const int read = c.scaled ? static_cast<int>(c.cols) : 0;
    uint32_t most = 0;
#pragma unroll 8
    for (int col = lane * 4; col < read; col += 128) {
      float x[4];
      fetch_right(rank, col, read, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) most = max(most, magnitude(x[i]));
    }
#pragma unroll
    for (int other = 1; other < 32; other *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, other));
    const int e = exponent(most);
    rank.right_factor = power_of_two(14 - e);
    rank.left_factor = rank.scale * power_of_two(e);
  }
  if (lane == 0) ranks[n] = rank;
}

template <int LEFT, int RIGHT>
__global__ void __launch_bounds__(kTileThreads, 2)
    merge_tiles(const Layer* layers, int count, const Rank* ranks, int slots) {
  using S = Shape<LEFT, RIGHT>;
  extern __shared__ __align__(16) char shared_memory[];
  const Layer& layer = layers[owner(layers, count, blockIdx.x)];
  const int item = static_cast<int>(blockIdx.x - layer.begin), steps = layer.steps;
  const int first = item / layer.col_tiles * layer.span, last = min(first + layer.span, layer.row_tiles);
  const Tiles<LEFT, RIGHT> tiles{layer, ranks, shared_memory,
                                 item % layer.col_tiles * S::kCols};
  // More steps than slots: the right factor comes again for every tile, through two slots.
  Quad held;

  tiles.prefetch_weight(first * S::kRows);
  if (steps > 0) {
    held = tiles.fetch_step(0, first * S::kRows);
    tiles.template pack_right<2>(0, steps <= slots ? steps * kStep : kStep, 0);
    tiles.pack_left(0, held, 0);
  }
  __syncthreads();
  int n = 0;  // steps so far; the buffers alternate
  for (int tile = first; tile < last; ++tile) {
    const int row0 = tile * S::kRows;
    if (tile + 1 < last) tiles.prefetch_weight(row0 + S::kRows);
    typename Tiles<LEFT, RIGHT>::Sums total = {};
    for (int step = 0; step < steps; ++step, ++n) {
      const bool wraps = step + 1 == steps, more = !wraps || tile + 1 < last;
      const int next = wraps ? 0 : step + 1;
      if (more) held = tiles.fetch_step(next, wraps ? row0 + S::kRows : row0);
      tiles.multiply(n, steps <= slots ? step : n & 1, total);
      if (more) {
        tiles.pack_left(next, held, n + 1);
        if (steps > slots) tiles.template pack_right<1>(next * kStep, (next + 1) * kStep, (n + 1) & 1);
      }
      __syncthreads();
    }
    tiles.add_to_weight(row0, total);
  }
}

// fp64 weights, and any on old cards: tiles of 64 x 64, a thread 4 rows of every sixteenth column, in plain fp64.
constexpr int kDoubleTile = 64, kDoubleThreads = 256;
constexpr size_t kDoubleShared = 2 * kStep * kDoubleTile * sizeof(double);

__global__ void __launch_bounds__(kDoubleThreads)
    merge_doubles(const Layer* layers, int count, const Rank* ranks, int) {
  extern __shared__ __align__(16) char shared_memory[];
  double* const left = reinterpret_cast<double*>(shared_memory);
  double* const right = left + kStep * kDoubleTile;
  const Layer& layer = layers[owner(layers, count, blockIdx.x)];
  const int item = static_cast<int>(blockIdx.x - layer.begin);
  const int row0 = item / layer.col_tiles * kDoubleTile, col0 = item % layer.col_tiles * kDoubleTile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  double total[4][4] = {};
  for (int step = 0; step < layer.steps; ++step) {
    __syncthreads();
    const Rank* const rank = ranks + layer.rank_begin + step * kStep;
    for (int i = threadIdx.x; i < kStep * kDoubleTile; i += kDoubleThreads) {
      const Rank& of_left = rank[i % kStep];
      const Rank& of_right = rank[i / kDoubleTile];
      double l[1] = {0}, r[1] = {0};
      const int row = row0 + i / kStep, col = col0 + i % kDoubleTile;
      if (of_left.left && row < layer.rows) load<1>(of_left.left + row * of_left.left_row, of_left.left_kind, l);
      if (of_right.right && col < layer.cols) load<1>(of_right.right + int64_t{col} * of_right.right_col, of_right.right_kind, r);
      left[i % kStep * kDoubleTile + i / kStep] = l[0] * static_cast<double>(of_left.scale);
      right[i] = r[0];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total[i][j] = fma(left[k * kDoubleTile + 4 * y + i], right[k * kDoubleTile + x + 16 * j], total[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = row0 + 4 * y + i, col = col0 + x + 16 * j;
      const double one[1] = {total[i][j]};
      if (row < layer.rows && col < layer.cols) meet<1>(layer, row, col, one);
    }
  }
}

struct Matrix {
  char* data;
  int64_t rows, cols, row, col;  // strides in bytes
  int kind;

  static Matrix of(const Tensor& t) {
    const int64_t size = static_cast<int64_t>(t.element_size());
    return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), t.size(0), t.size(1), t.stride(0) * size,
            t.stride(1) * size, kind_of(t)};
  }
  Matrix transposed() const { return {data, cols, rows, col, row, kind}; }
  bool wide() const {
    return col == itemsize(kind) && reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows == 1 || row % 16 == 0);
  }
};

// The layers that one kernel takes.
enum Group { kCast, kSingle, kPair, kDoubles, kGroups };
struct Tile {
  int64_t rows, cols;
};
constexpr Tile kTiles[kGroups] = {{Shape<1, 1>::kRows, Shape<1, 1>::kCols}, {Shape<2, 1>::kRows, Shape<2, 1>::kCols},
                                  {Shape<2, 2>::kRows, Shape<2, 2>::kCols}, {kDoubleTile, kDoubleTile}};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda("merge_", "a question about the device", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many tiles a block walks. Long walks spare the right factor's packing, which costs about a tile; `resident` blocks run
// at a time, and a last turn that few of them take leaves processors idle.
int64_t span_of(const std::vector<Layer>& layers, int64_t resident) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t span = 1; span <= 16; ++span) {
    int64_t items = 0;
    for (const Layer& layer : layers) items += ceil_div(layer.row_tiles, span) * layer.col_tiles;
    const int64_t cost = ceil_div(items, resident) * (span + 1);
    if (cost < least) best = span, least = cost;
  }
  return best;
}

// Launches a kernel for layers [first, first + count) of the table; `steps`: the most that one of them has.
template <int LEFT, int RIGHT>
void launch_tiles(int64_t blocks, int steps, int device, cudaStream_t stream, const Layer* layers, int count,
                  const Rank* ranks) {
  using S = Shape<LEFT, RIGHT>;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int room = static_cast<int>((most - S::shared(0)) / S::kSlotBytes);
  const int slots = std::max(2, std::min(steps, room));
  const size_t shared = S::shared(slots);
  const void* const kernel = reinterpret_cast<const void*>(&merge_tiles<LEFT, RIGHT>);
  check_cuda("merge_", "a request for shared memory",
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  check_cuda("merge_", "a request for shared memory over cache",
             cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  launch("merge_", merge_tiles<LEFT, RIGHT>, blocks, kTileThreads, shared, stream, layers, count, ranks, slots);
}

void check_factors(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& scale, size_t l, size_t k,
                   int64_t device) {
  if (is_cuda_float(A, 2, device) && is_cuda_float(B, 2, device) && is_cuda_float(scale, 1, device) &&
      scale.scalar_type() == ScalarType::Float && A.size(1) == weight.size(1) && B.size(0) == weight.size(0) &&
      B.size(1) == A.size(0) && scale.size(0) == A.size(0)) {
    return;
  }
  const std::string index = "[" + std::to_string(k) + "]";
  check_cuda_float(A, 2, device, "merge_", "As" + index + " (r, in)");
  check_cuda_float(B, 2, device, "merge_", "Bs" + index + " (out, r)");
  check_cuda_float(scale, 1, device, "merge_", "scales" + index + " (r,)");
  check(scale.scalar_type() == ScalarType::Float, "merge_: expected scales", index, " in float32, got ",
        name(scale.scalar_type()));
  check(A.size(1) == weight.size(1) && B.size(0) == weight.size(0) && B.size(1) == A.size(0) && scale.size(0) == A.size(0),
        "merge_: expected As", index, " (r, in), Bs", index, " (out, r) and scales", index, " (r,) for weights[", l,
        "] (out, in) of shape ", shape(weight), ", got ", shape(A), ", ", shape(B), " and ", shape(scale));
}

}  // namespace

void merge_cuda_(std::vector<Tensor> weights, std::vector<Tensor> residuals, const std::vector<Tensor>& As,
                 const std::vector<Tensor>& Bs, const std::vector<Tensor>& scales, std::vector<int64_t> counts,
                 std::vector<int64_t> seeds) {
  const size_t number = weights.size();
  check(counts.size() == number, "merge_: expected a count for each of ", number, " weights, got ", counts.size());
  check(residuals.empty() || residuals.size() == number, "merge_: expected no residuals or one for each of ", number,
        " weights, got ", residuals.size());
  check(seeds.empty() || seeds.size() == number, "merge_: expected no seeds or one for each of ", number,
        " weights, got ", seeds.size());
  int64_t total = 0;
  for (int64_t count : counts) {
    check(count >= 0, "merge_: expected counts of at least 0, got ", count);
    total += count;
  }
  check(static_cast<int64_t>(As.size()) == total && Bs.size() == As.size() && scales.size() == As.size(),
        "merge_: expected ", total, " As, Bs and scales, the sum of counts, got ", As.size(), ", ", Bs.size(), " and ",
        scales.size());
  if (number == 0) return;

  const int64_t device = weights[0].get_device();
  Written written;
  for (size_t l = 0, k = 0; l < number; ++l) {
    const std::string index = "[" + std::to_string(l) + "]";
    check_cuda_float(weights[l], 2, device, "merge_", "weights" + index + " (out, in)");
    check_writable(weights[l], "merge_", "weights" + index);
    written.add(weights[l]);
    if (!residuals.empty()) {
      check_cuda_float(residuals[l], 2, device, "merge_", "residuals" + index + " (out, in)");
      check(residuals[l].size(0) == weights[l].size(0) && residuals[l].size(1) == weights[l].size(1),
            "merge_: expected residuals", index, " of the weight's shape ", shape(weights[l]), ", got ", shape(residuals[l]));
      check_writable(residuals[l], "merge_", "residuals" + index);
      written.add(residuals[l]);
    }
    for (const size_t end = k + static_cast<size_t>(counts[l]); k < end; ++k) {
      check_factors(weights[l], As[k], Bs[k], scales[k], l, k, device);
    }
  }
  written.finish();

  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const int ordinal = static_cast<int>(device);
  // Older cards lack the matrix instruction: all their weights take the kernel for fp64.
  const bool old = attribute(cudaDevAttrComputeCapabilityMajor, ordinal) < 8;
  const int processors = attribute(cudaDevAttrMultiProcessorCount, ordinal);
  const cudaStream_t stream = current_stream("merge_", device);

  std::vector<Tensor> copies;  // of factors that are views of what is written
  auto settled = [&](const Tensor& t) {
    if (!written.meets(t)) return t;
    copies.push_back(torch::stable::clone(t));
    return copies.back();
  };
  std::vector<Client> clients;
  std::vector<Layer> groups[kGroups];
  int64_t slots = 0;
  for (size_t l = 0, k = 0; l < number; ++l) {
    const size_t begin = k, end = k + static_cast<size_t>(counts[l]);
    k = end;
    Matrix weight = Matrix::of(weights[l]), residual{};
    if (!residuals.empty()) residual = Matrix::of(residuals[l]);
    if (weight.rows == 0 || weight.cols == 0) continue;
    // Less than int32 holds, since the last tile reaches beyond the last row.
    check(std::max(weight.rows, weight.cols) < (int64_t{1} << 30), "merge_: expected weights[", l,
          "] with fewer than 2^30 rows and columns, got shape ", shape(weights[l]));
    // Rows are those whose elements lie closer: a weight stored by columns is merged as its transpose.
    const bool transposed = weight.cols == 1 || (weight.rows > 1 && weight.row < weight.col);
    if (transposed) {
      weight = weight.transposed();
      residual = residual.transposed();
    }
    const bool precise = weight.kind == kFloat || residual.data;
    const bool cast = weight.kind == kBFloat16 && !residual.data && seeds.empty();
    Group group = weight.kind == kDouble || old ? kDoubles : cast ? kCast : kSingle;
    const int64_t rank_begin = slots;
    for (size_t c = begin; c < end; ++c) {
      const int64_t rank = As[c].size(0);
      if (rank == 0) continue;
      const Tensor A = settled(As[c]), B = settled(Bs[c]), scale = settled(scales[c]);
      const Matrix left = transposed ? Matrix::of(A).transposed() : Matrix::of(B);
      const Matrix right = transposed ? Matrix::of(B).transposed() : Matrix::of(A);
      if (group == kSingle && precise && (right.kind == kFloat || right.kind == kDouble)) group = kPair;
      clients.push_back({left.data, right.data, static_cast<const char*>(scale.const_data_ptr()), left.row, left.col,
                         right.row, right.col, scale.stride(0) * 4, weight.cols, slots, static_cast<int32_t>(rank),
                         left.kind, right.kind, group == kSingle || group == kPair});
      slots += rank;
    }
    if (slots == rank_begin && !residual.data) continue;
    const int64_t steps = ceil_div(slots - rank_begin, kStep);
    slots = rank_begin + steps * kStep;
    const Tile tile = kTiles[group];
    const uint64_t seed = seeds.empty() ? 0 : static_cast<uint64_t>(seeds[l]);
    groups[group].push_back({weight.data, residual.data, weight.row, weight.col, residual.row, residual.col, 0, rank_begin,
                             static_cast<int32_t>(weight.rows), static_cast<int32_t>(weight.cols),
                             static_cast<int32_t>(steps),
                             static_cast<int32_t>(ceil_div(weight.rows, tile.rows)),
                             static_cast<int32_t>(ceil_div(weight.cols, tile.cols)), 1, weight.kind, residual.kind,
                             !seeds.empty(), transposed, weight.wide() && (!residual.data || residual.wide()),
                             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  }

  // Weights that share memory are merged one after another, all others in one launch of their kernel.
  std::vector<char> table;
  size_t offsets[kGroups];
  std::vector<int64_t> blocks[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    int64_t items = 0;
    const int64_t span = g == kDoubles ? 1 : span_of(groups[g], 2 * processors);
    for (Layer& layer : groups[g]) {
      layer.span = static_cast<int32_t>(span);
      layer.begin = written.apart ? items : 0;
      blocks[g].push_back(ceil_div(layer.row_tiles, span) * layer.col_tiles);
      items += blocks[g].back();
    }
    if (written.apart && items > 0) blocks[g] = {items};
    offsets[g] = append(table, groups[g]);
  }
  const size_t clients_at = append(table, clients);
  if (table.empty()) return;
  const Tensor on_device = upload("merge_", weights[0], table, stream);
  const Tensor listed = scratch(weights[0], std::max<size_t>(1, static_cast<size_t>(slots)) * sizeof(Rank));
  const char* const base = static_cast<const char*>(on_device.const_data_ptr());
  Rank* const ranks = static_cast<Rank*>(listed.mutable_data_ptr());
  if (slots > 0) {
    launch("merge_", list_ranks, ceil_div(slots, kListThreads / 32), kListThreads, 0, stream,
           reinterpret_cast<const Client*>(base + clients_at), static_cast<int>(clients.size()), ranks, slots);
  }
  for (int g = 0; g < kGroups; ++g) {
    for (size_t i = 0; i < blocks[g].size(); ++i) {
      const Layer* const layers = reinterpret_cast<const Layer*>(base + offsets[g]) + i;
      const int count = written.apart ? static_cast<int>(groups[g].size()) : 1;
      int steps = 0;
      for (int n = 0; n < count; ++n) steps = std::max(steps, groups[g][i + static_cast<size_t>(n)].steps);
      if (g == kDoubles) {
        launch("merge_", merge_doubles, blocks[g][i], kDoubleThreads, kDoubleShared, stream, layers, count, ranks, 0);
      } else if (g == kPair) {
        launch_tiles<2, 2>(blocks[g][i], steps, ordinal, stream, layers, count, ranks);
      } else if (g == kSingle) {
        launch_tiles<2, 1>(blocks[g][i], steps, ordinal, stream, layers, count, ranks);
      } else {
        launch_tiles<1, 1>(blocks[g][i], steps, ordinal, stream, layers, count, ranks);
      }
    }
  }
}

std::tuple<int64_t, int64_t> checked_merge_cuda_(std::vector<Tensor> weights, std::vector<Tensor> residuals,
                                                 std::vector<Tensor> As, std::vector<Tensor> Bs, std::vector<Tensor> scales,
                                                 std::vector<int64_t> counts, std::vector<int64_t> seeds, bool write) {
  const auto found = look_over(weights, residuals, As, Bs, scales, counts, first_not_finite_cuda);
  if (write && std::get<0>(found) == 0) merge_cuda_(weights, residuals, As, Bs, scales, counts, seeds);
  return found;
}

}  // namespace flora
