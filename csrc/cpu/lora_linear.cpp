// lora_linear, lora_linear_backward and lora_add_ on the CPU: flora/kernels/reference.py says what they compute.
//
// h comes from one pass over x for all layers. Then every block of y is written once: the base product, the low-rank one
// and the bias meet in the registers' sums, which are rounded once, so neither a product of y's size nor a second pass
// over y exists. The backward pass is the same shape: dh from one pass over dy, dx once for all layers, then dA and dB.
// fp16 is multiplied in fp32; bf16 in bf16 where the processor can, its sums in fp32.
#include "../common.h"
#include "../ops.h"
#include "products.h"

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

namespace flora {
namespace {

using Optional = std::optional<Tensor>;

View view(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Out out_of(const Tensor& t, bool add) {
  return {t.mutable_data_ptr(), t.scalar_type(), t.stride(0), t.stride(1), add};
}

std::vector<int64_t> integers(const Tensor& t, const char* op, const char* what) {
  check(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.is_contiguous(), op, ": expected ", what,
        " as contiguous int64 on the CPU, got ", name(t.scalar_type()), " ", shape(t));
  const int64_t* data = t.const_data_ptr<int64_t>();
  return {data, data + t.numel()};
}

// What says which rows use which ranks, for the trained ranks and for the frozen ones.
struct Routes {
  const char* op;
  int64_t rows;
  bool packed;
  std::vector<int64_t> row_offsets, rank_offsets, ranges;

  Routes(const char* op, int64_t rows, const Optional& row, const Optional& rank, const Optional& frozen_ranges)
      : op(op), rows(rows), packed(row.has_value() && rank.has_value()) {
    row_offsets = packed ? integers(*row, op, "row_offsets") : std::vector<int64_t>{0, rows};
    if (packed) rank_offsets = integers(*rank, op, "rank_offsets");
    if (frozen_ranges) ranges = integers(*frozen_ranges, op, "frozen_ranges");
    check(!row_offsets.empty() && row_offsets.front() == 0 && row_offsets.back() == rows &&
              std::is_sorted(row_offsets.begin(), row_offsets.end()),
          op, ": expected row_offsets that rise from 0 to the ", rows, " rows");
    check(!packed || (rank_offsets.size() == row_offsets.size() && rank_offsets.front() == 0 &&
                      std::is_sorted(rank_offsets.begin(), rank_offsets.end())),
          op, ": expected as many rank_offsets as row_offsets, rising from 0");
    check(ranges.empty() || ranges.size() == 2 * (row_offsets.size() - 1), op,
          ": expected one pair of frozen_ranges for each client");
  }

  std::vector<Segment> own(int64_t ranks) const {
    if (!packed) return {{0, rows, 0, ranks}};
    check(rank_offsets.back() == ranks, op, ": expected rank_offsets that end at the ", ranks, " ranks of A, got ",
          rank_offsets.back());
    std::vector<Segment> all;
    for (size_t k = 0; k + 1 < row_offsets.size(); ++k) {
      all.push_back({row_offsets[k], row_offsets[k + 1], rank_offsets[k], rank_offsets[k + 1]});
    }
    return all;
  }

  std::vector<Segment> frozen(int64_t ranks) const {
    if (ranges.empty()) return {{0, rows, 0, ranks}};
    std::vector<Segment> all;
    for (size_t k = 0; k + 1 < row_offsets.size(); ++k) {
      const int64_t begin = ranges[2 * k], end = ranges[2 * k + 1];
      check(0 <= begin && begin <= end && end <= ranks, op, ": expected frozen_ranges within the ", ranks,
            " frozen ranks, got ", begin, " to ", end);
      all.push_back({row_offsets[k], row_offsets[k + 1], begin, end});
    }
    return all;
  }
};

int64_t widest(const std::vector<Segment>& segments) {
  int64_t width = 0;
  for (const Segment& s : segments) width = std::max(width, s.ranks());
  return width;
}

// One set of ranks of a layer, trained or frozen, and its scratch.
template <typename E>
struct Path {
  View A, B;
  std::vector<float> scale;
  std::vector<Segment> segments;
  const Mask* mask;
  int64_t width, ld;
  Buffer<E> h;

  Path(const Routes& to, const Tensor& a, const Tensor& b, const Tensor& s, int64_t out, int64_t in, bool trained,
       const Mask* mask)
      : mask(mask) {
    const std::string what = trained ? "" : "frozen ";
    check_cpu_float(a, 2, to.op, what + "A (R, in)");
    check_cpu_float(b, 2, to.op, what + "B (out, R)");
    check_cpu_float(s, 1, to.op, what + "scale (R,)");
    check(s.scalar_type() == ScalarType::Float && a.size(1) == in && b.size(0) == out && b.size(1) == a.size(0) &&
              s.size(0) == a.size(0),
          to.op, ": expected ", what, "A (R, ", in, "), B (", out, ", R) and float32 scale (R,), got ", shape(a), ", ",
          shape(b), " and ", name(s.scalar_type()), " ", shape(s));
    A = view(a), B = view(b);
    for (int64_t i = 0; i < s.size(0); ++i) scale.push_back(s.const_data_ptr<float>()[i * s.stride(0)]);
    segments = trained ? to.own(a.size(0)) : to.frozen(a.size(0));
    width = widest(segments);
    ld = round_up(std::max<int64_t>(1, width), kPair<E>);
    h = buffer<E>(to.rows * ld);
  }
};

// The masks of the layers; empty without dropout.
std::vector<Mask> masks_of(const std::vector<Tensor>& keys, size_t layers, int64_t rows, double dropout, ScalarType dtype,
                           const char* op) {
  std::vector<Mask> masks;
  check(keys.empty() || keys.size() == layers, op, ": expected keys for every layer or for none");
  double value = 1.0 / (1.0 - dropout);
  if (dtype != ScalarType::Double) {
    const float quotient = 1.0f / static_cast<float>(1.0 - dropout);
    with_type(dtype, [&](auto* d) { value = widen(narrow<Storage<decltype(d)>>(quotient)); });
  }
  for (const Tensor& key : keys) {
    check(key.is_cpu() && key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == rows, op,
          ": expected int64 keys (", rows, ",) on the CPU, got ", name(key.scalar_type()), " ", shape(key));
    masks.push_back({key.const_data_ptr<int64_t>(), key.stride(0),
                     static_cast<uint32_t>(std::nearbyint(dropout * (1 << 24))), value});
  }
  return masks;
}

// Calls f with null pointers of the types of the factors and of the sums for products in `dtype`.
template <typename F>
void with_products(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) {
    f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  } else if (dtype == ScalarType::BFloat16 && multiplies_bf16()) {
    f(static_cast<BFloat16*>(nullptr), static_cast<float*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
  }
}

void check_matrix(const Tensor& t, int64_t rows, int64_t cols, const char* op, const char* what) {
  check_cpu_float(t, 2, op, what);
  check(t.size(0) == rows && t.size(1) == cols, op, ": expected ", what, " of shape (", rows, ", ", cols, "), got ",
        shape(t));
}

// What the layers of a forward call have each: the trained ranks, the frozen ones if any, and where h is kept.
template <typename E>
struct Layer {
  Path<E> own;
  std::optional<Path<E>> held;
};

template <typename E>
std::vector<Layer<E>> layers_of(const Routes& routes, const std::vector<Tensor>& As, const std::vector<Tensor>& Bs,
                                const std::vector<Tensor>& scales, const std::vector<Tensor>& frozen,
                                const std::vector<int64_t>& widths, const std::vector<Mask>& masks, int64_t in) {
  const size_t L = As.size();
  check(L > 0 && Bs.size() == L && scales.size() == L && widths.size() == L && (frozen.empty() || frozen.size() == 3 * L),
        routes.op, ": expected as many As, Bs, scales and widths as layers, and three frozen tensors a layer or none");
  std::vector<Layer<E>> layers;
  for (size_t i = 0; i < L; ++i) {
    check_cpu_float(As[i], 2, routes.op, "A (R, in)");
    check_cpu_float(Bs[i], 2, routes.op, "B (out, R)");
    const int64_t out = Bs[i].size(0);
    layers.push_back({{routes, As[i], Bs[i], scales[i], out, in, true, masks.empty() ? nullptr : &masks[i]}, {}});
    if (!frozen.empty()) {
      layers[i].held.emplace(routes, frozen[3 * i], frozen[3 * i + 1], frozen[3 * i + 2], out, in, false, nullptr);
    }
    check(widths[i] >= layers[i].own.width, routes.op, ": expected a width of at least ", layers[i].own.width, ", got ",
          widths[i]);
    layers[i].own.width = widths[i];
  }
  return layers;
}

template <typename E, typename T>
ShrinkJob<E, T> shrink_job(Path<E>& path, const View& right, const Mask* mask, char* h) {
  return {right, path.segments, path.scale.data(), mask, h, path.h.get(), path.width, path.ld};
}

template <typename E>
void add_terms(std::vector<Term<E>>& terms, const Layer<E>& layer, bool forward) {
  const auto add = [&](const Path<E>& path, const Mask* mask) {
    terms.push_back({path.h.get(), path.ld, forward ? path.B.transposed() : path.A, path.segments, mask});
  };
  add(layer.own, forward ? nullptr : layer.own.mask);
  if (layer.held) add(*layer.held, nullptr);
}

int64_t itemsize(const Tensor& t) { return static_cast<int64_t>(t.element_size()); }

// Where packing the weight costs more than multiplying with it, torch's own product has y first.
constexpr int64_t kFewRows = 32;

std::optional<Tensor> linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const ScalarType dtype = x.scalar_type();
  if (x.size(0) == 0 || x.size(0) >= kFewRows || (dtype != ScalarType::Float && dtype != ScalarType::Double)) return {};
  if (weight.scalar_type() != dtype || (bias && bias->scalar_type() != dtype)) return {};
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Products with the weights only where y does not hold them yet.
template <typename E, typename T>
void forward(const Tensor& x, const std::vector<Optional>& weights, const std::vector<Optional>& biases,
             std::vector<Layer<E>>& layers, const std::vector<Tensor>& ys, const Tensor& h) {
  const int64_t M = x.size(0), K = x.size(1);
  const Left<E> left = left_of<E, T>(view(x));
  std::vector<ShrinkJob<E, T>> jobs;
  char* at = static_cast<char*>(h.mutable_data_ptr());
  for (auto& layer : layers) {
    jobs.push_back(shrink_job<E, T>(layer.own, layer.own.A.transposed(), layer.own.mask, at));
    at += layer.own.width * itemsize(x);
    if (layer.held) jobs.push_back(shrink_job<E, T>(*layer.held, layer.held->A.transposed(), nullptr, nullptr));
  }
  shrink<E, T>(view(x), left, jobs, x.scalar_type(), h.size(1));
  for (size_t i = 0; i < layers.size(); ++i) {
    std::vector<Term<E>> terms;
    if (weights[i]) terms.push_back({left.data, left.ld, view(*weights[i]).transposed(), {{0, M, 0, K}}, nullptr});
    add_terms(terms, layers[i], true);
    const int64_t N = ys[i].size(1);
    Buffer<T> bias;
    if (weights[i] && biases[i]) {
      bias = buffer<T>(N);
      const Tensor& b = *biases[i];
      kit<T, T>().copy_rows({b.const_data_ptr(), b.scalar_type(), 1, N, 0, b.stride(0)}, 0, 1, nullptr, bias.get(), N);
    }
    const Out out = out_of(ys[i], !weights[i]);
    Expand<E, T>{.M = M, .N = N, .terms = terms, .out = out, .bias = bias.get()}.run();
  }
}

template <typename E, typename T>
void backward(const std::vector<Tensor>& dys, const Optional& x, const Tensor& h, const std::vector<Tensor>& weights,
              std::vector<Layer<E>>& layers, const Tensor& dx, const std::vector<Tensor>& dAs,
              const std::vector<Tensor>& dBs, const std::vector<bool>& needs) {
  const size_t L = dys.size();
  const int64_t M = dys[0].size(0);
  std::vector<Left<E>> lefts;
  std::vector<ReduceJob<E>> to_A;
  for (size_t i = 0; i < L; ++i) {
    Path<E>& own = layers[i].own;
    if (needs[0] || needs[1 + i]) {
      lefts.push_back(left_of<E, T>(view(dys[i])));
      std::vector<ShrinkJob<E, T>> jobs{shrink_job<E, T>(own, own.B, nullptr, nullptr)};
      if (needs[0] && layers[i].held) jobs.push_back(shrink_job<E, T>(*layers[i].held, layers[i].held->B, nullptr, nullptr));
      shrink<E, T>(view(dys[i]), lefts[i], jobs, dys[i].scalar_type(), 0);
    } else {
      lefts.emplace_back();
    }
    if (needs[1 + i]) {
      to_A.push_back({{own.h.get(), kDtype<E>, M, own.width, own.ld, 1}, own.segments, own.mask, out_of(dAs[i], false)});
    }
  }
  if (needs[0]) {
    std::vector<Term<E>> terms;
    for (size_t i = 0; i < weights.size(); ++i) {
      terms.push_back({lefts[i].data, lefts[i].ld, view(weights[i]), {{0, M, 0, dys[i].size(1)}}, nullptr});
    }
    for (const auto& layer : layers) add_terms(terms, layer, false);
    const Out out = out_of(dx, false);
    Expand<E, T>{.M = M, .N = dx.size(1), .terms = terms, .out = out, .bias = nullptr}.run();
  }
  if (!to_A.empty()) reduce<E, T>(view(*x), to_A);
  int64_t column = 0;
  for (size_t i = 0; i < L; column += layers[i++].own.width) {
    if (!needs[1 + L + i]) continue;
    View kept = view(h);
    with_type(kept.dtype, [&](auto* s) { kept.data = kept.at<Storage<decltype(s)>>(0, column); });
    Out out = out_of(dBs[i], false);
    std::swap(out.row_stride, out.col_stride);
    reduce<E, T>(view(dys[i]), {{kept, layers[i].own.segments, nullptr, out}});
  }
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> lora_linear_cpu(
    const Tensor& x, std::vector<Tensor> weights, std::vector<Optional> biases, std::vector<Tensor> As,
    std::vector<Tensor> Bs, std::vector<Tensor> scales, std::vector<Tensor> frozen, Optional row_offsets,
    Optional rank_offsets, Optional frozen_ranges, std::vector<int64_t> widths, double dropout, std::vector<Tensor> keys) {
  const char* op = "lora_linear";
  check_cpu_float(x, 2, op, "x (M, in)");
  const int64_t M = x.size(0);
  const size_t L = As.size();
  check(L > 0 && weights.size() == L && biases.size() == L && Bs.size() == L && widths.size() == L, op,
        ": expected as many weights, biases, Bs and widths as As");
  const Routes routes(op, M, row_offsets, rank_offsets, frozen_ranges);
  const std::vector<Mask> masks = masks_of(keys, L, M, dropout, x.scalar_type(), op);
  std::vector<Tensor> ys;
  std::vector<Optional> left;  // the weights that are still to be multiplied with
  int64_t width = 0;
  for (size_t i = 0; i < L; ++i) {
    check_cpu_float(Bs[i], 2, op, "B (out, R)");
    const int64_t N = Bs[i].size(0);
    check_matrix(weights[i], N, x.size(1), op, "weight (out, in)");
    if (biases[i]) check_cpu_float(*biases[i], 1, op, "bias (out,)");
    check(!biases[i] || biases[i]->size(0) == N, op, ": expected bias (", N, ",)");
    const Optional y = linear(x, weights[i], biases[i]);
    ys.push_back(y ? *y : torch::stable::new_empty(x, {M, N}));
    left.push_back(y ? Optional{} : Optional{weights[i]});
    width += widths[i];
  }
  Tensor h = torch::stable::new_empty(x, {M, width});
  with_products(x.scalar_type(), [&](auto* e, auto* t) {
    using E = Storage<decltype(e)>;
    using T = Storage<decltype(t)>;
    auto layers = layers_of<E>(routes, As, Bs, scales, frozen, widths, masks, x.size(1));
    forward<E, T>(x, left, biases, layers, ys, h);
  });
  return {ys, h};
}

Tensor lora_add_cpu_(Tensor y, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& scale,
                     std::vector<Tensor> frozen, Optional row_offsets, Optional rank_offsets, Optional frozen_ranges,
                     int64_t width, double dropout, Optional keys) {
  const char* op = "lora_add_";
  check_cpu_float(x, 2, op, "x (M, in)");
  check_cpu_float(B, 2, op, "B (out, R)");
  const int64_t M = x.size(0);
  check_matrix(y, M, B.size(0), op, "y (M, out)");
  check_writable(y, op, "y");
  const Routes routes(op, M, row_offsets, rank_offsets, frozen_ranges);
  const std::vector<Tensor> all_keys = keys ? std::vector<Tensor>{*keys} : std::vector<Tensor>{};
  const std::vector<Mask> masks = masks_of(all_keys, 1, M, dropout, x.scalar_type(), op);
  Tensor h = torch::stable::new_empty(x, {M, width});
  with_products(x.scalar_type(), [&](auto* e, auto* t) {
    using E = Storage<decltype(e)>;
    using T = Storage<decltype(t)>;
    auto layers = layers_of<E>(routes, {A}, {B}, {scale}, frozen, {width}, masks, x.size(1));
    forward<E, T>(x, {std::nullopt}, {std::nullopt}, layers, {y}, h);
  });
  return h;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_backward_cpu(
    std::vector<Tensor> dys, Optional x, const Tensor& h, std::vector<Tensor> weights, std::vector<Tensor> As,
    std::vector<Tensor> Bs, std::vector<Tensor> scales, std::vector<Tensor> frozen, Optional row_offsets,
    Optional rank_offsets, Optional frozen_ranges, std::vector<int64_t> widths, double dropout, std::vector<Tensor> keys,
    std::vector<bool> needs) {
  const char* op = "lora_linear_backward";
  const size_t L = As.size();
  check(L > 0 && dys.size() == L && Bs.size() == L && widths.size() == L && (weights.empty() || weights.size() == L) &&
            needs.size() == 1 + 2 * L,
        op, ": expected as many dys, As, Bs and weights (or none) as layers, and needs for dx, every A and every B");
  check_cpu_float(dys[0], 2, op, "dy (M, out)");
  check_cpu_float(As[0], 2, op, "A (R, in)");
  const Tensor& dy = dys[0];
  const int64_t M = dy.size(0), K = As[0].size(1);
  const Routes routes(op, M, row_offsets, rank_offsets, frozen_ranges);
  const std::vector<Mask> masks = masks_of(keys, L, M, dropout, dy.scalar_type(), op);
  std::vector<Tensor> dAs, dBs;
  int64_t width = 0;
  bool any_A = false, any_B = false;
  const auto grad = [](const Tensor& t, bool need, bool as_laid_out) {
    if (!need) return torch::stable::new_empty(t, {0});
    const bool turned = as_laid_out && t.stride(0) == 1 && t.stride(1) == t.size(0) && !t.is_contiguous();
    if (!turned) return torch::stable::new_empty(t, {t.size(0), t.size(1)});
    return torch::stable::transpose(torch::stable::new_empty(t, {t.size(1), t.size(0)}), 0, 1);
  };
  for (size_t i = 0; i < L; ++i) {
    check_cpu_float(As[i], 2, op, "A (R, in)");
    check_cpu_float(Bs[i], 2, op, "B (out, R)");
    check_matrix(dys[i], M, Bs[i].size(0), op, "dy (M, out)");
    check(dys[i].scalar_type() == dy.scalar_type(), op, ": expected every dy in ", name(dy.scalar_type()));
    if (!weights.empty()) check_matrix(weights[i], Bs[i].size(0), K, op, "weight (out, in)");
    dAs.push_back(grad(As[i], needs[1 + i], false));
    dBs.push_back(grad(Bs[i], needs[1 + L + i], true));
    width += widths[i];
    any_A |= needs[1 + i], any_B |= needs[1 + L + i];
  }
  check(!any_A || x.has_value(), op, ": expected x for the gradients of A, got None");
  if (any_A) check_matrix(*x, M, K, op, "x (M, in)");
  if (any_B) check_matrix(h, M, width, op, "h (M, widths)");
  Tensor dx = needs[0] ? torch::stable::new_empty(dy, {M, K}) : torch::stable::new_empty(dy, {0});
  with_products(dy.scalar_type(), [&](auto* e, auto* t) {
    using E = Storage<decltype(e)>;
    using T = Storage<decltype(t)>;
    auto layers = layers_of<E>(routes, As, Bs, scales, frozen, widths, masks, K);
    backward<E, T>(dys, x, h, weights, layers, dx, dAs, dBs, needs);
  });
  return {dx, dAs, dBs};
}

}  // namespace flora
