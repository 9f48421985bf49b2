// The fibers of shim.h, and what the tests call.
#include "shim.h"

#include <deque>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

dim3 thread_index, block_index, block_size, grid_size;
unsigned char *dynamic_shared;

namespace {

constexpr size_t STACK = 256 << 10;

enum class Waits { NoOne, Warp, Block, Ended };

// Where a stack was left. The compiler's own jumps: they cost a few instructions, where swapcontext costs two system calls.
using Place = void *[5];

struct Fiber {
  ucontext_t context; // to enter it the first time
  Place place;
  bool entered = false;
  std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
  Waits waits;
  bool other_room;
  void *fake_stack = nullptr;
};

struct Rooms {
  unsigned char of[2][32 * ROOM_A_LANE];
};

std::deque<Fiber> fibers; // they stay where they are: their stacks have been entered
std::vector<Rooms> rooms;
Place scheduler;
const std::function<void()> *body;
const char *running = "";
unsigned launches;
// Of the scheduler's stack, told to AddressSanitizer when a fiber goes back to it.
const void *scheduler_stack;
size_t scheduler_size;

void leave_for(void **save, const void *stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, size);
#else
  (void)save, (void)stack, (void)size;
#endif
}

void arrive(void *saved, const void **from, size_t *size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(saved, from, size);
#else
  (void)saved, (void)from, (void)size;
#endif
}

// Out of the sanitizer's sight: it would make a system call before what does not return.
[[gnu::noipa, gnu::no_sanitize_address]] void jump(Place &to) { __builtin_longjmp(to, 1); }

Fiber &current() { return fibers[thread_index.x]; }

void yield(Waits waits) {
  Fiber &mine = current();
  mine.waits = waits;
  leave_for(&mine.fake_stack, scheduler_stack, scheduler_size);
  if (!__builtin_setjmp(mine.place)) jump(scheduler);
  arrive(mine.fake_stack, &scheduler_stack, &scheduler_size);
}

// A fiber is a thread of one block after the other.
void thread_main() {
  arrive(nullptr, &scheduler_stack, &scheduler_size);
  for (;;) {
    (*body)();
    yield(Waits::Ended);
  }
}

[[gnu::noinline]] void enter(Fiber &fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, thread_main, 0);
  setcontext(&fiber.context);
}

void resume(unsigned thread) {
  thread_index = {thread, 0, 0};
  void *mine = nullptr;
  Fiber &fiber = fibers[thread];
  leave_for(&mine, fiber.stack.data(), STACK);
  if (!__builtin_setjmp(scheduler)) {
    if (std::exchange(fiber.entered, true)) jump(fiber.place);
    enter(fiber);
  }
  arrive(mine, nullptr, nullptr);
}

// Lets go the threads from `from` to `to` if all that have not ended wait for `waits`; whether any was.
bool release(unsigned from, unsigned to, Waits waits) {
  bool any = false;
  for (unsigned i = from; i < to; i++) {
    if (fibers[i].waits == Waits::Ended) continue;
    if (fibers[i].waits != waits) return false;
    any = true;
  }
  for (unsigned i = from; i < to; i++)
    if (fibers[i].waits == waits) fibers[i].waits = Waits::NoOne;
  return any;
}

void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) fibers[i].waits = Waits::NoOne, fibers[i].other_room = false;
  for (bool alive = true; alive;) {
    alive = false;
    for (unsigned k = 0; k < threads; k++) {
      unsigned thread = launches % 2 ? threads - 1 - k : k;
      if (fibers[thread].waits == Waits::NoOne) resume(thread);
      alive |= fibers[thread].waits != Waits::Ended;
    }
    bool released = false;
    for (unsigned warp = 0; warp < threads; warp += 32) released |= release(warp, min(warp + 32, threads), Waits::Warp);
    if (alive && !released && !release(0, threads, Waits::Block)) fail("threads wait at different barriers");
  }
}

} // namespace

std::vector<Kernel> &kernels() {
  static std::vector<Kernel> all;
  return all;
}

void block_barrier() { yield(Waits::Block); }
void warp_barrier() { yield(Waits::Warp); }

unsigned char *exchange_room() {
  Fiber &mine = current();
  mine.other_room = !mine.other_room;
  return rooms[thread_index.x / 32].of[mine.other_room];
}

void fail(const char *what) {
  std::fprintf(stderr, "kernel %s, block (%u, %u, %u): %s\n", running, block_index.x, block_index.y, block_index.z, what);
  std::abort();
}

} // namespace shim

// Memory is poisoned: every byte 0xff, so every number not a number.
extern "C" void *shim_allocate(size_t bytes) {
  void *memory = nullptr;
  if (posix_memalign(&memory, 256, bytes)) std::abort();
  std::memset(memory, 0xff, bytes);
  return memory;
}

extern "C" void shim_release(void *memory) { std::free(memory); }

// Runs a kernel; `sizes` are those of the arguments in bytes, checked against the parameters'.
extern "C" void shim_launch(const char *name, const unsigned *grid, unsigned threads, size_t shared, void **arguments,
                            const unsigned *sizes, unsigned count) {
  using namespace shim;
  running = name;
  const Kernel *kernel = nullptr;
  for (const Kernel &one : kernels())
    if (!std::strcmp(one.name, name)) kernel = &one;
  if (!kernel) fail("no such kernel");
  if (kernel->threads != threads) fail("launched with another number of threads than it is made for");
  if (kernel->sizes.size() != count) fail("launched with another number of arguments");
  for (unsigned i = 0; i < count; i++)
    if (kernel->sizes[i] != sizes[i]) fail("an argument has another size than the parameter");
  while (fibers.size() < threads) fibers.emplace_back();
  rooms.resize(fibers.size() / 32 + 1);
  std::function<void()> call = [&] { kernel->call(arguments); };
  body = &call;
  launches++;
  block_size = {threads, 1, 1};
  grid_size = {grid[0], grid[1], grid[2]};
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        block_index = {x, y, z};
        dynamic_shared = static_cast<unsigned char *>(shim_allocate(shared));
        run_block(threads);
        shim_release(dynamic_shared);
      }
}

// A matrix operand; `dtype` starts with f3, bf or f1.
struct Operand {
  uint64_t at, stride;
  const char *dtype;
  unsigned turned;

  template <class V> V *element(uint64_t row, uint64_t column) const {
    if (turned) std::swap(row, column);
    return reinterpret_cast<V *>(at) + row * stride + column;
  }
  float get(uint64_t row, uint64_t column) const {
    if (dtype[0] == 'b') return __bfloat162float(*element<bf16>(row, column));
    return dtype[1] == '3' ? *element<float>(row, column) : __half2float(*element<f16>(row, column));
  }
  void set(uint64_t row, uint64_t column, float x) const {
    if (dtype[0] == 'b') *element<bf16>(row, column) = __float2bfloat16_rn(x);
    else if (dtype[1] == '3') *element<float>(row, column) = x;
    else *element<f16>(row, column) = __float2half_rn(x);
  }
};

// out (m, n) = a (m, k) b (k, n) + beta out.
extern "C" void shim_multiply(const Operand *a, const Operand *b, const Operand *out, uint64_t m, uint64_t n, uint64_t k, float beta) {
  for (uint64_t i = 0; i < m; i++)
    for (uint64_t j = 0; j < n; j++) {
      double sum = 0;
      for (uint64_t l = 0; l < k; l++) sum += double(a->get(i, l)) * b->get(l, j);
      out->set(i, j, float(sum) + (beta == 0 ? 0 : beta * out->get(i, j)));
    }
}
