// Teams of threads: an own pool, and one borrowed from the OpenMP runtime that is in the process already.
//
// The pool's barriers spin for some microseconds, because the threads of a decode step arrive close together; then they
// yield, then they sleep on a futex, so that a machine with other work, or with fewer CPUs than threads, gets on too.

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#include "abi.h"
#include "kernels.h"
#include "team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int MOST_THREADS = 256;
constexpr int CACHE_LINE = 64;
constexpr int SPINS = 1000;  // 20 to 50 microseconds, by how long the CPU's pause takes
constexpr int YIELDS = 16;

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Round to nearest and keep subnormal numbers while it lives, whatever the calling thread does elsewhere (torch's
// set_flush_denormal, libraries linked with -ffast-math): results must not depend on which thread computes them.
class DefaultFloatingPoint {
 public:
#if defined(__x86_64__)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultFloatingPoint() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

[[noreturn]] void misuse(const char *what) {
  std::fprintf(stderr, "qlm: %s\n", what);
  std::abort();
}

int available_cpus() {
  cpu_set_t cpus;
  return sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : INT_MAX;
}

// A number that threads wait to see changed.
struct alignas(CACHE_LINE) Epoch {
  std::atomic<uint32_t> value{0};
  std::atomic<int> sleepers{0};

  void advance() {
    value.fetch_add(1, std::memory_order_seq_cst);
    // A sleeper says so before it looks at the value for the last time (in the kernel), so that one of both is seen.
    if (sleepers.load(std::memory_order_seq_cst) != 0)
      syscall(SYS_futex, address(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  void wait_until_past(uint32_t old, int spins) {
    for (int i = 0; i < spins; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause_briefly();
    }
    for (int i = 0; i < YIELDS; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      sched_yield();
    }
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (value.load(std::memory_order_seq_cst) == old)
      syscall(SYS_futex, address(), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  uint32_t *address() { return reinterpret_cast<uint32_t *>(&value); }
};
static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain 32-bit word");

// Everything that the threads of one process share. A fork leaves the child a copy whose threads do not exist and whose
// locks may be held by them: it is abandoned there, never touched.
struct Crew {
  explicit Crew(int threads)
      : process(getpid()), threads(threads), spins(threads <= available_cpus() ? SPINS : 0) {}

  const pid_t process;
  const int threads;
  const int spins;  // none where the one that is waited for may need this CPU
  std::mutex calls;
  std::vector<pthread_t> workers;

  void (*work)(void *, int) = nullptr;
  void *context = nullptr;
  bool stop = false;
  Epoch started;   // one step for each call
  Epoch finished;  // one step for each barrier
  alignas(CACHE_LINE) std::atomic<int> arrived{0};
  alignas(CACHE_LINE) std::atomic<int64_t> next{0};

  void barrier() {
    if (threads == 1) {
      next.store(0, std::memory_order_relaxed);
      return;
    }
    // It cannot step on before this thread has arrived.
    const uint32_t old = finished.value.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      next.store(0, std::memory_order_relaxed);
      finished.advance();
    } else {
      finished.wait_until_past(old, spins);
    }
  }
};

struct Worker {
  Crew *crew;
  int thread;
};

void *serve(void *argument) {
  const std::unique_ptr<Worker> self(static_cast<Worker *>(argument));
  Crew &crew = *self->crew;
  const DefaultFloatingPoint environment;
  // Calls start only when all workers exist, and each ends with a barrier: none is missed.
  for (uint32_t call = 0;; ++call) {
    crew.started.wait_until_past(call, crew.spins);
    if (crew.stop) return nullptr;
    crew.work(crew.context, self->thread);
    crew.barrier();
  }
}

void dismiss(Crew *crew) {
  crew->stop = true;
  crew->started.advance();
  for (const pthread_t worker : crew->workers) pthread_join(worker, nullptr);
  delete crew;
}

// Throws std::system_error or std::bad_alloc, with nothing left behind.
Crew *hire(int threads) {
  std::unique_ptr<Crew> crew(new Crew(threads));
  crew->workers.reserve(static_cast<size_t>(threads));
  // Workers leave signals to the threads that expect them, but for those that a thread's own instruction raises.
  sigset_t blocked, saved;
  sigfillset(&blocked);
  for (const int number : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&blocked, number);
  pthread_sigmask(SIG_SETMASK, &blocked, &saved);
  int failure = 0;
  for (int thread = 1; thread < threads && failure == 0; ++thread) {
    std::unique_ptr<Worker> worker(new (std::nothrow) Worker{crew.get(), thread});
    pthread_t id;
    failure = worker == nullptr ? ENOMEM : pthread_create(&id, nullptr, serve, worker.get());
    if (failure != 0) break;
    worker.release();  // the thread's own now
    crew->workers.push_back(id);
    pthread_setname_np(id, "qlm");
  }
  pthread_sigmask(SIG_SETMASK, &saved, nullptr);
  if (failure != 0) {
    dismiss(crew.release());
    throw std::system_error(failure, std::generic_category(), "cannot start a thread");
  }
  return crew.release();
}

class Pool final : public qlm_team {
 public:
  explicit Pool(int threads) : threads_(threads), crew_(hire(threads)) {}

  ~Pool() override {
    Crew *const crew = crew_.load();
    if (crew->process == getpid()) dismiss(crew);
  }

  int threads() const override { return threads_; }

  void run(void (*work)(void *, int), void *context) override {
    Crew &crew = here();
    const std::lock_guard<std::mutex> lock(crew.calls);
    const DefaultFloatingPoint environment;
    crew.next.store(0, std::memory_order_relaxed);
    if (threads_ == 1) return work(context, 0);
    crew.work = work;
    crew.context = context;
    crew.started.advance();
    work(context, 0);
    crew.barrier();
  }

  void barrier() override { crew_.load(std::memory_order_relaxed)->barrier(); }

  int64_t next() override { return crew_.load(std::memory_order_relaxed)->next.fetch_add(1, std::memory_order_relaxed); }

 private:
  const int threads_;
  std::atomic<Crew *> crew_;

  // This process's crew. Throws what hire() throws, after a fork.
  Crew &here() {
    Crew *crew = crew_.load(std::memory_order_acquire);
    if (crew->process == getpid()) return *crew;
    Crew *const own = hire(threads_);
    if (crew_.compare_exchange_strong(crew, own)) return *own;
    dismiss(own);  // another thread of the child was first
    return *crew;
  }
};

// Threads of GNU's OpenMP interface, which libomp and libiomp5 have too: void GOMP_parallel(void (*)(void *), void *,
// unsigned threads, unsigned flags), libgomp's libgomp_g.h. The runtime may bring fewer threads than it is asked for, in
// a nested parallel region for example, and nobody knows how many beforehand: there is no barrier inside a run.
class Borrowed final : public qlm_team {
 public:
  using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

  Borrowed(Parallel parallel, int threads)
      : parallel_(parallel), threads_(threads), state_(new State{getpid(), parallel, threads}) {}

  ~Borrowed() override {
    State *const state = state_.load();
    if (state->process == getpid()) delete state;
  }

  int threads() const override { return threads_; }

  void run(void (*work)(void *, int), void *context) override {
    State &state = here();
    const std::lock_guard<std::mutex> lock(state.calls);
    state.work = work;
    state.context = context;
    state.arrived.store(0, std::memory_order_relaxed);
    state.next.store(0, std::memory_order_relaxed);
    if (state.threads == 1)
      come(&state);
    else
      state.parallel(come, &state, static_cast<unsigned>(state.threads), 0);
  }

  void barrier() override { misuse("a barrier inside a run of a borrowed team, whose number of threads is not known"); }

  int64_t next() override {
    return state_.load(std::memory_order_relaxed)->next.fetch_add(1, std::memory_order_relaxed);
  }

 private:
  struct State {
    State(pid_t process, Parallel parallel, int threads) : process(process), parallel(parallel), threads(threads) {}

    const pid_t process;
    const Parallel parallel;
    const int threads;
    std::mutex calls;
    void (*work)(void *, int) = nullptr;
    void *context = nullptr;
    alignas(CACHE_LINE) std::atomic<int> arrived{0};
    alignas(CACHE_LINE) std::atomic<int64_t> next{0};
  };

  const Parallel parallel_;
  const int threads_;
  std::atomic<State *> state_;

  static void come(void *argument) {
    State &state = *static_cast<State *>(argument);
    const DefaultFloatingPoint environment;
    state.work(state.context, state.arrived.fetch_add(1, std::memory_order_relaxed));
  }

  // This process's state. A child works alone: an OpenMP pool does not survive a fork.
  State &here() {
    State *state = state_.load(std::memory_order_acquire);
    if (state->process == getpid()) return *state;
    State *const own = new State(getpid(), parallel_, 1);
    if (state_.compare_exchange_strong(state, own)) return *own;
    delete own;
    return *state;
  }
};

// Make a team, or say why not.
template <typename Make>
int make(int32_t threads, qlm_team **team, Make make_team) {
  if (team == nullptr) return qlm::fail(QLM_BAD_ARGUMENT, "a team: no place to put it was given");
  if (threads < 1 || threads > MOST_THREADS)
    return qlm::fail(QLM_BAD_ARGUMENT, "a team of %d threads: expected 1 to %d", threads, MOST_THREADS);
  try {
    *team = make_team();
    return QLM_OK;
  } catch (const std::exception &error) {
    return qlm::fail(QLM_NO_MEMORY, "a team of %d threads: %s", threads, error.what());
  }
}

}  // namespace

int qlm_team_create(int32_t threads, qlm_team **team) {
  return make(threads, team, [&] { return new Pool(threads); });
}

int qlm_team_borrow(void *gomp_parallel, int32_t threads, qlm_team **team) {
  if (gomp_parallel == nullptr) return qlm::fail(QLM_BAD_ARGUMENT, "a borrowed team: GOMP_parallel's address is NULL");
  return make(threads, team, [&] {
    return new Borrowed(reinterpret_cast<Borrowed::Parallel>(gomp_parallel), threads);
  });
}

void qlm_team_destroy(qlm_team *team) { delete team; }

int32_t qlm_team_threads(const qlm_team *team) { return team == nullptr ? 0 : team->threads(); }
