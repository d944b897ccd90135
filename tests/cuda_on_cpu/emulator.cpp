// Runs a kernel on the CPU, thread by thread. It finds: wrong index arithmetic and values, accesses that are not aligned
// (the sources are compiled with -fsanitize=alignment,shift,signed-integer-overflow; the handlers are below), barriers that
// some threads pass and others do not, and such missing barriers as show when the threads run in another order. It does not
// find: races inside a warp, anything about memory ordering, and nothing about speed. It is not a GPU.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "shim.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace cuda_on_cpu {

Index thread, block;

namespace {

constexpr size_t kStack = 128 << 10;

struct Fiber {
  jmp_buf place;
  std::vector<char> stack;
  enum { idle, waiting, done } state = idle;
};

struct Machine {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::vector<uint64_t> slots;
  int order = 0;  // 0 rising, 1 falling, else the seed of a shuffle
  int64_t first_block = 0, last_block = INT64_MAX;
  int launches = 0, blocks = 0, faults = 0, device = 0;
  std::string failure;
} machine;

// Leave a fiber; resume() comes back.
void yield(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(machine.scheduler, 1);
}

void enter() {
  for (;;) {  // a kernel each time
    (*machine.kernel)();
    Fiber& fiber = machine.fibers[thread.x];
    fiber.state = Fiber::done;
    yield(fiber);
  }
}

void start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  fiber.stack.resize(kStack);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Run a fiber up to its next barrier, or to the end of the kernel. Jumps make no system calls, unlike swapcontext.
void resume(unsigned number) {
  Fiber& fiber = machine.fibers[number];
  thread.x = number;
  if (_setjmp(machine.scheduler)) return;
  if (fiber.stack.empty()) start(fiber);
  _longjmp(fiber.place, 1);
}

std::vector<unsigned> ordered(unsigned count) {
  std::vector<unsigned> numbers(count);
  for (unsigned i = 0; i < count; ++i) numbers[i] = machine.order == 1 ? count - 1 - i : i;
  if (machine.order > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(unsigned(machine.order)));
  return numbers;
}

void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) machine.fibers[i].state = Fiber::idle;
  const std::vector<unsigned> numbers = ordered(threads);
  for (unsigned done = 0; done < threads;) {
    for (const unsigned number : numbers) resume(number);
    done = 0;
    for (unsigned i = 0; i < threads; ++i) done += machine.fibers[i].state == Fiber::done;
    if (done > 0 && done < threads) {
      machine.fibers.clear();
      throw std::logic_error("some threads of a block ended before a barrier of others");
    }
  }
}

}  // namespace

int launch(int blocks, int threads, const std::function<void()>& kernel) {
  if (!machine.failure.empty()) return 1;
  if (blocks < 1) throw std::logic_error("a launch of no blocks");
  if (machine.fibers.size() < size_t(threads)) machine.fibers = std::vector<Fiber>(threads);
  machine.slots.assign(threads, 0);
  machine.kernel = &kernel;
  machine.faults = 0;
  ++machine.launches;
  const int64_t first = machine.first_block, last = std::min<int64_t>(blocks, machine.last_block);
  for (int64_t i = first; i < last; ++i, ++machine.blocks) {
    block.x = unsigned(machine.order == 1 ? last - 1 - (i - first) : i);
    run_block(unsigned(threads));
  }
  if (machine.faults) throw std::logic_error("misaligned accesses or overflows: " + std::to_string(machine.faults));
  return cudaSuccess;
}

void barrier() {
  Fiber& fiber = machine.fibers[thread.x];
  fiber.state = Fiber::waiting;
  yield(fiber);
}

uint64_t exchange(uint64_t mine, unsigned other) {
  machine.slots[thread.x] = mine;
  barrier();
  const uint64_t theirs = machine.slots[other];
  barrier();
  return theirs;
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::machine;

cudaError_t cudaGetDevice(int* device) { return *device = machine.device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return machine.device = device, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return machine.failure.c_str(); }

EXPORTED void emulator_order(int order) { machine.order = order; }
EXPORTED void emulator_blocks(int64_t first, int64_t last) { machine.first_block = first, machine.last_block = last; }
EXPORTED void emulator_fail(const char* why) { machine.failure = why; }
EXPORTED int emulator_device() { return machine.device; }
EXPORTED int emulator_launches() { return std::exchange(machine.launches, 0); }
EXPORTED int emulator_blocks_run() { return std::exchange(machine.blocks, 0); }

// What the compiler calls where it finds an access or a sum that is not allowed.
#define FAULT(name) \
  extern "C" void __ubsan_handle_##name(void*, ...) { ++machine.faults; }
FAULT(type_mismatch_v1)
FAULT(shift_out_of_bounds)
FAULT(add_overflow)
FAULT(sub_overflow)
FAULT(mul_overflow)
FAULT(negate_overflow)
FAULT(divrem_overflow)
