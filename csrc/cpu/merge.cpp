// merge_: weight += the sum over clients of B diag(scale) A on the CPU, for all layers of a model in one parallel region.
//
// The work is cut into tasks, each a block of one weight. A task packs what its block needs of the clients' own factors
// into the thread's scratch, in the working type (fp32; fp64 for an fp64 or a very small weight) and with the scale on the
// left: their dtypes, strides and number end there. A tile's sums stay in registers over all ranks and meet the weight
// once, so the weight is read once, written once and rounded once, and no dense product exists. Ranks are cut into chunks
// that depend on nothing but their number, and every element adds them in one order: same bits for any thread count.
#include "../common.h"
#include "../look_over.h"
#include "../ops.h"
#include "products.h"

#include <atomic>
#include <numeric>
#include <string>
#include <utility>

namespace flora {
namespace {

// Ranks that are packed at a time; more than these and the sums of a block of rows are parked meanwhile. With the constants
// below a thread's scratch stays under 1 MB, for fp64 too.
constexpr int64_t kRanks = 256;
constexpr int64_t kRightBytes = 384 << 10;  // of the right factor; it stays in the L2 cache while rows pass
constexpr int64_t kParkedRows = 256;
// Tasks for each thread: fewer and the last of them keep the others waiting, more and the right factor is packed more often.
constexpr int64_t kShare = 24;
// What reading, rounding and writing an element costs, in multiply-adds.
constexpr int64_t kTouch = 16;
// Up to this many elements fp64 sums cost nothing, and a sum that cancels has no neighbours to hide its error among.
constexpr int64_t kSmallWeight = 4096;

// One client's ranks of one layer: they are `begin` and following of the layer's.
struct Client {
  View left, right;
  const float* scale;
  int64_t scale_stride, begin;
};

// A weight with the shorter stride along its columns, so that tiles are wide along the closer elements: where it is laid
// out by columns all is exchanged, and Wᵀ += Aᵀ diag(scale) Bᵀ.
struct Layer {
  Rounding to;
  int64_t rows, cols, rank;
  bool fp64;
  std::vector<Client> clients;

  int64_t cost() const { return rows * cols * (rank + kTouch); }
  bool nearest() const { return !to.residual.data && !to.seeded; }
};

struct Task {
  const Layer* layer;
  int64_t row, row_end, panel, panel_end;
};

// The ranks of a layer cut into chunks; one empty chunk where there are none.
Groups chunks_of(int64_t rank) {
  Groups chunks(std::max<int64_t>(1, rank), kRanks);
  chunks.n = rank;
  return chunks;
}

// Where things are in a thread's scratch, for one layer.
template <typename T>
struct Layout {
  const Kit<T, T>& k = kit<T, T>();
  const Groups chunks;
  const int64_t block, parked, tile;  // rows packed, rows parked, elements of a tile

  explicit Layout(const Layer& layer)
      : chunks(chunks_of(layer.rank)), block(kBlockRows / k.rows * k.rows), parked(kParkedRows / k.rows * k.rows),
        tile(k.rows * k.cols) {}

  // Panels that fit.
  int64_t most() const { return std::max<int64_t>(1, kRightBytes / (chunks.size * k.cols * int64_t{sizeof(T)})); }
  int64_t left() const { return round_up(block * chunks.size, 16); }
  int64_t sums(int64_t panels) const { return chunks.count > 1 ? parked / k.rows * panels * tile : tile; }
  int64_t bytes(int64_t panels) const {
    return sizeof(T) * (left() + sums(panels) + panels * chunks.size * k.cols);
  }
};

template <typename T>
struct Block {
  const Layer& layer;
  const Task& task;
  const Layout<T> at{layer};
  const Kit<T, T>& k = at.k;
  T *left, *sums, *right;

  Block(const Task& task, char* scratch) : layer(*task.layer), task(task) {
    left = reinterpret_cast<T*>(scratch);
    sums = left + at.left();
    right = sums + at.sums(task.panel_end - task.panel);
  }

  // Calls f with each client that has some of the ranks begin to end, and with these.
  template <typename F>
  void clients(int64_t begin, int64_t end, const F& f) const {
    for (const Client& one : layer.clients) {
      const int64_t from = std::max(begin, one.begin), to = std::min(end, one.begin + one.left.cols);
      if (from < to) f(one, from, to - from);
    }
  }

  void pack_right(int64_t begin, int64_t end) const {
    const int64_t col = task.panel * k.cols, n = std::min(layer.cols, task.panel_end * k.cols) - col;
    clients(begin, end, [&](const Client& one, int64_t from, int64_t depth) {
      k.pack(one.right, from - one.begin, depth, col, n, nullptr, right, (end - begin) * k.cols, from - begin);
    });
  }

  void pack_left(int64_t row, int64_t rows, int64_t begin, int64_t end) const {
    T scale[kRanks];
    clients(begin, end, [&](const Client& one, int64_t from, int64_t depth) {
      const int64_t first = from - one.begin;
      for (int64_t i = 0; i < depth; ++i) scale[i] = one.scale[(first + i) * one.scale_stride];
      merge_kit<T>().scale_rows(one.left, row, rows, first, depth, scale, left + (from - begin), end - begin);
    });
  }

  // Asks for the lines of a tile of the weight and of the residual, which come from memory.
  void fetch(int64_t row, int64_t panel) const {
    const int64_t rows = std::min(k.rows, task.row_end - row), n = std::min(k.cols, layer.cols - panel * k.cols);
    k.fetch_lines(layer.to.weight, row, rows, panel * k.cols, n);
    if (layer.to.residual.data) k.fetch_lines(layer.to.residual, row, rows, panel * k.cols, n);
  }

  void write(int64_t row, int64_t panel, T* tile) const {
    const int64_t rows = std::min(k.rows, task.row_end - row), n = std::min(k.cols, layer.cols - panel * k.cols);
    if (layer.nearest()) {
      k.write_lines(layer.to.weight, row, rows, panel * k.cols, n, nullptr, tile);
    } else {
      merge_kit<T>().round_lines(layer.to, row, rows, panel * k.cols, n, tile);
    }
  }

  // Rows row to end, which are packed, times one chunk of ranks; `to` is where the sums of these rows are parked.
  void multiply(int64_t row, int64_t end, int64_t depth, bool resume, bool last, T* to) const {
    const bool park = at.chunks.count > 1;
    for (int64_t i = row; i < end; i += k.rows) {
      for (int64_t p = task.panel; p < task.panel_end; ++p) {
        const int64_t width = round_up(std::min(k.cols, layer.cols - p * k.cols), k.lanes);
        const Piece<T> piece(left, depth, i - row, end - row, right + (p - task.panel) * depth * k.cols, depth);
        if (last && p + 1 < task.panel_end) {
          fetch(i, p + 1);
        } else if (last && i + k.rows < task.row_end) {
          fetch(i + k.rows, task.panel);
        }
        k.multiply[width / k.lanes](&piece, 1, resume, to);
        if (last) write(i, p, to);
        if (park) to += at.tile;
      }
    }
  }

  // `held`: the right factor is packed already.
  void run(bool held) const {
    const Groups& chunks = at.chunks;
    const int64_t step = chunks.count > 1 ? at.parked : task.row_end - task.row;
    for (int64_t row = task.row; row < task.row_end; row += step) {
      const int64_t stop = std::min(task.row_end, row + step);
      for (int64_t c = 0; c < chunks.count; ++c) {
        const int64_t begin = chunks.begin(c), end = chunks.begin(c + 1);
        if (!held) pack_right(begin, end);
        T* to = sums;
        for (int64_t r = row; r < stop; r += at.block) {
          const int64_t rows = std::min(at.block, stop - r);
          pack_left(r, rows, begin, end);
          multiply(r, r + rows, end - begin, c > 0, c + 1 == chunks.count, to);
          if (chunks.count > 1) to += at.block / k.rows * (task.panel_end - task.panel) * at.tile;
        }
      }
    }
  }
};

// Appends the blocks of one layer, each of about `target` multiply-adds; returns the scratch that they need.
template <typename T>
int64_t cut(const Layer& layer, int64_t target, std::vector<Task>& tasks) {
  const Layout<T> at(layer);
  const int64_t depth = layer.rank + kTouch;
  const int64_t panel_work = std::min(layer.rows, at.block) * at.k.cols * depth;
  const Groups groups(ceil_div(layer.cols, at.k.cols), std::min(at.most(), std::max<int64_t>(1, target / panel_work)));
  const int64_t fit = std::max<int64_t>(1, target / (at.block * groups.size * at.k.cols * depth));
  const Groups blocks(ceil_div(layer.rows, at.block), fit);
  for (int64_t g = 0; g < groups.count; ++g) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      tasks.push_back({&layer, blocks.begin(b) * at.block, std::min(layer.rows, blocks.begin(b + 1) * at.block),
                       groups.begin(g), groups.begin(g + 1)});
    }
  }
  return at.bytes(groups.size);
}

void merge(std::vector<Layer>& layers) {
  // The largest first, so that what is left over at the end is small.
  std::stable_sort(layers.begin(), layers.end(), [](const Layer& a, const Layer& b) { return a.cost() > b.cost(); });
  const int64_t threads = torch::stable::get_num_threads();
  int64_t target = 0, bytes = 0;
  for (const Layer& layer : layers) target += layer.cost();
  target = std::max(kGrain, target / (threads * kShare));
  std::vector<Task> tasks;
  for (const Layer& layer : layers) {
    bytes = std::max(bytes, layer.fp64 ? cut<double>(layer, target, tasks) : cut<float>(layer, target, tasks));
  }
  const int64_t count = tasks.size();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    const Buffer<char> scratch = buffer<char>(bytes);
    const Task* before = nullptr;
    for (int64_t i = next++; i < count; i = next++) {
      const Task& task = tasks[i];
      const bool held = before && before->layer == task.layer && before->panel == task.panel && task.layer->rank <= kRanks;
      if (task.layer->fp64) {
        Block<double>(task, scratch.get()).run(held);
      } else {
        Block<float>(task, scratch.get()).run(held);
      }
      before = &task;
    }
  });
}

constexpr const char* kOp = "merge_";

std::string item(const char* list, size_t index) { return std::string(list) + "[" + std::to_string(index) + "]"; }

// A name costs more to write than all of the checks: only where one fails.
void check_item(const Tensor& t, int64_t dims, const char* list, size_t index, const char* sizes) {
  if (t.is_cpu() && t.dim() == dims && is_float(t.scalar_type())) return;
  check_cpu_float(t, dims, kOp, item(list, index) + " " + sizes);
}

View view(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Client client(const Tensor& A, const Tensor& B, const Tensor& scale, int64_t out, int64_t in, size_t index) {
  check_item(A, 2, "As", index, "(r, in)");
  check_item(B, 2, "Bs", index, "(out, r)");
  check_item(scale, 1, "scales", index, "(r,)");
  if (scale.scalar_type() != ScalarType::Float) {
    check(false, kOp, ": expected ", item("scales", index), " in float32, got ", name(scale.scalar_type()));
  }
  const View a = view(A), b = view(B);
  if (a.cols != in || b.rows != out || b.cols != a.rows || scale.size(0) != a.rows) {
    check(false, kOp, ": expected ", item("As", index), " (r, in), ", item("Bs", index), " (out, r) and ",
          item("scales", index), " (r,) for a weight (out, in) of shape (", out, ", ", in, "), got ", shape(A), ", ",
          shape(B), " and ", shape(scale));
  }
  return {b, a, scale.const_data_ptr<float>(), scale.stride(0), 0};
}

Out written(const Tensor& t) { return {t.mutable_data_ptr(), t.scalar_type(), t.stride(0), t.stride(1), true}; }

bool sixteen_bits(ScalarType dtype) { return dtype == ScalarType::Half || dtype == ScalarType::BFloat16; }

void turn(Layer& layer) {
  std::swap(layer.rows, layer.cols);
  for (Out* out : {&layer.to.weight, &layer.to.residual}) std::swap(out->row_stride, out->col_stride);
  for (Client& one : layer.clients) {
    const View left = one.left;
    one.left = one.right.transposed();
    one.right = left.transposed();
  }
  layer.to.turned = true;
}

}  // namespace

void merge_cpu_(std::vector<Tensor> weights, std::vector<Tensor> residuals, std::vector<Tensor> As, std::vector<Tensor> Bs,
                std::vector<Tensor> scales, std::vector<int64_t> counts, std::vector<int64_t> seeds) {
  check(counts.size() == weights.size(), kOp, ": expected one count for each of the ", weights.size(), " weights, got ",
        counts.size());
  check(residuals.empty() || residuals.size() == weights.size(), kOp, ": expected no residuals or one for each of the ",
        weights.size(), " weights, got ", residuals.size());
  check(seeds.empty() || seeds.size() == weights.size(), kOp, ": expected no seeds or one for each of the ",
        weights.size(), " weights, got ", seeds.size());
  for (const int64_t count : counts) check(count >= 0, kOp, ": expected counts of 0 or more, got ", count);
  const size_t given = std::accumulate(counts.begin(), counts.end(), size_t{0});
  check(As.size() == given && Bs.size() == given && scales.size() == given, kOp, ": expected as many As, Bs and scales as the ",
        given, " clients that the counts add up to, got ", As.size(), ", ", Bs.size(), " and ", scales.size());

  std::vector<Layer> layers;
  size_t next = 0;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    check_item(weight, 2, "weights", l, "(out, in)");
    check_writable(weight, kOp, item("weights", l));
    const int64_t out = weight.size(0), in = weight.size(1);
    Layer layer{{written(weight), {}, false, false, 0}, out, in, 0, false, {}};
    layer.fp64 = weight.scalar_type() == ScalarType::Double || out * in <= kSmallWeight;
    if (!residuals.empty()) {
      const Tensor& residual = residuals[l];
      check_item(residual, 2, "residuals", l, "(out, in)");
      check_writable(residual, kOp, item("residuals", l));
      check(residual.size(0) == out && residual.size(1) == in, kOp, ": expected residuals[", l,
            "] of the weight's shape ", shape(weight), ", got ", shape(residual));
      layer.to.residual = written(residual);
    }
    if (!seeds.empty()) {
      layer.to.seeded = sixteen_bits((residuals.empty() ? weight : residuals[l]).scalar_type());
      layer.to.seed = static_cast<uint64_t>(seeds[l]);
    }
    for (int64_t c = 0; c < counts[l]; ++c, ++next) {
      Client one = client(As[next], Bs[next], scales[next], out, in, next);
      one.begin = layer.rank;
      layer.rank += one.left.cols;
      if (one.left.cols > 0) layer.clients.push_back(one);
    }
    // Without ranks and without a residual to add nothing changes, not even the sign of a zero.
    if (out == 0 || in == 0 || (layer.rank == 0 && residuals.empty())) continue;
    if (in == 1 || (out > 1 && layer.to.weight.row_stride < layer.to.weight.col_stride)) turn(layer);
    layers.push_back(std::move(layer));
  }
  if (!layers.empty()) merge(layers);
}

std::tuple<int64_t, int64_t> checked_merge_cpu_(std::vector<Tensor> weights, std::vector<Tensor> residuals,
                                                std::vector<Tensor> As, std::vector<Tensor> Bs, std::vector<Tensor> scales,
                                                std::vector<int64_t> counts, std::vector<int64_t> seeds, bool write) {
  const auto found = look_over(weights, residuals, As, Bs, scales, counts, first_not_finite_cpu);
  if (write && std::get<0>(found) == 0) merge_cpu_(weights, residuals, As, Bs, scales, counts, seeds);
  return found;
}

}  // namespace flora
