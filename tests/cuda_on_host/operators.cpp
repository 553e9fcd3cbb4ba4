// The operators of csrc/cuda, compiled for the host, as torch.ops.flora_on_host on CPU tensors.
#include "cuda/finite.cu"
#include "cuda/merge.cu"
#include "cuda/stack.cu"

#include <torch/csrc/stable/library.h>

namespace flora {
namespace {
alignas(128) char shared_memory[on_host::kSharedMost];
}
}  // namespace flora

void on_host::run(unsigned blocks, unsigned threads, size_t shared, std::function<void()> kernel) {
  char* const memory = flora::shared_memory;
  const bool backwards = std::getenv("ON_HOST_BACKWARDS") != nullptr;
  machine.kernel = std::move(kernel);
  machine.threads = threads;
  ASAN_POISON_MEMORY_REGION(memory + shared, kSharedMost - shared);
  for (unsigned block = 0; block < blocks; ++block) {
    machine.block = block;
    std::memset(memory, 0xFF, shared);
    std::memset(static_cast<void*>(machine.exchanges.data()), 0, machine.exchanges.size() * sizeof(Exchange));
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = machine.fibers[t];
      fiber.done = fiber.waits = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, enter, 0);
    }
    const unsigned warps = (threads + 31) / 32;
    for (bool more = true; more;) {
      more = false;
      for (unsigned w = 0; w < warps; ++w) {
        const unsigned warp = (backwards ? warps - 1 - w : w) * 32;
        for (machine.thread = warp; machine.thread < std::min(warp + 32, threads); ++machine.thread) {
          if (machine.fibers[machine.thread].done) continue;
          swapcontext(&machine.scheduler, &machine.fibers[machine.thread].context);
          break;  // the lanes go on to one another
        }
      }
      for (unsigned t = 0; t < threads; ++t) {
        more |= !machine.fibers[t].done;
        machine.fibers[t].waits = false;
      }
    }
  }
  ASAN_UNPOISON_MEMORY_REGION(memory, kSharedMost);
}

STABLE_TORCH_LIBRARY(flora_on_host, m) {
  m.def(
      "merge_(Tensor(a!)[] weights, Tensor(b!)[] residuals, Tensor[] As, Tensor[] Bs, Tensor[] scales, int[] counts, "
      "int[] seeds) -> ()");
  m.def(
      "stack_(Tensor(a!) out_A, Tensor(b!) out_B, Tensor(c!) out_scale, Tensor[] As, Tensor[] Bs, Tensor[] scales)"
      " -> ()");
  m.def("first_not_finite(Tensor[] tensors) -> int");
  m.def(
      "checked_merge_(Tensor(a!)[] weights, Tensor(b!)[] residuals, Tensor[] As, Tensor[] Bs, Tensor[] scales, int[] counts, "
      "int[] seeds, bool write) -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(flora_on_host, CPU, m) {
  m.impl("merge_", TORCH_BOX(&flora::merge_cuda_));
  m.impl("stack_", TORCH_BOX(&flora::stack_cuda_));
  m.impl("first_not_finite", TORCH_BOX(&flora::first_not_finite_cuda));
  m.impl("checked_merge_", TORCH_BOX(&flora::checked_merge_cuda_));
}
