// A pass by several threads: a pool that lives as long as the process, and is made anew in a fork.

#include "tasks.hpp"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace bnlayer {
namespace {

constexpr int64_t kAligned = 64;          // positions: parts of a run begin where a vector does
constexpr int64_t kPatienceNs = 100'000;  // about what it takes to wake a thread, which is longer than most passes
constexpr int kTurns = 64;                // between two looks at the clock

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

// Waits for a condition without sleeping. False: it took too long.
template <class Condition>
bool soon(Condition holds) {
  for (int64_t until = 0;;) {
    for (int turn = 0; turn < kTurns; ++turn) {
      if (holds()) return true;
      pause();
    }
    const int64_t now = now_ns();
    if (until == 0) until = now + kPatienceNs;
    if (now >= until) return false;
  }
}

struct Job {
  void (*call)(void*, int);
  void* context;
  int count;
  std::atomic<int> next{0};

  void work() {
    for (int i = next.fetch_add(1); i < count; i = next.fetch_add(1)) call(context, i);
  }
};

// The threads that help with a pass. As long as nobody sleeps, a pass takes no lock: a thread says that it is at work, and
// then looks for the job; who gave the job takes it back, and then looks who is at work. One of the two sees the other.
class Pool {
 public:
  void over(Job& job) {
    if (pthread_mutex_trylock(&busy_) != 0) return job.work();  // another thread's pass has the pool
    while (threads_ < job.count - 1 && start()) ++threads_;
    job_.store(&job);
    number_.fetch_add(1);
    if (asleep_.load() > 0) {
      pthread_mutex_lock(&lock_);
      pthread_cond_broadcast(&wake_);
      pthread_mutex_unlock(&lock_);
    }
    job.work();
    job_.store(nullptr);
    const auto nobody = [this] { return working_.load() == 0; };
    if (!soon(nobody)) {
      pthread_mutex_lock(&lock_);
      waits_.store(true);
      while (!nobody()) pthread_cond_wait(&done_, &lock_);
      waits_.store(false);
      pthread_mutex_unlock(&lock_);
    }
    pthread_mutex_unlock(&busy_);
  }

 private:
  bool start() {
    // Signals are for the threads of Python.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool started = pthread_create(&thread, nullptr, serve_in, this) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (started) pthread_detach(thread);
    return started;
  }

  static void* serve_in(void* pool) {
    static_cast<Pool*>(pool)->serve();
    return nullptr;
  }

  void serve() {
    unsigned seen = 0;  // a job that was published before this thread began to look is still there, or is null
    for (;;) {
      const auto published = [this, &seen] { return number_.load() != seen; };
      if (!soon(published)) {
        pthread_mutex_lock(&lock_);
        asleep_.fetch_add(1);
        while (!published()) pthread_cond_wait(&wake_, &lock_);
        asleep_.fetch_sub(1);
        pthread_mutex_unlock(&lock_);
      }
      seen = number_.load();
      working_.fetch_add(1);
      Job* job = job_.load();
      if (job != nullptr) job->work();
      if (working_.fetch_sub(1) == 1 && waits_.load()) {
        pthread_mutex_lock(&lock_);
        pthread_cond_signal(&done_);
        pthread_mutex_unlock(&lock_);
      }
    }
  }

  // What is waited for lies in one cache line, and the locks in others.
  alignas(64) std::atomic<Job*> job_{nullptr};
  std::atomic<unsigned> number_{0};
  std::atomic<int> working_{0}, asleep_{0};
  std::atomic<bool> waits_{false};
  int threads_ = 0;  // by whoever has the pool
  alignas(64) pthread_mutex_t busy_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER, done_ = PTHREAD_COND_INITIALIZER;
};

Pool* pool = nullptr;
pthread_once_t made_once = PTHREAD_ONCE_INIT, keyed_once = PTHREAD_ONCE_INIT;

void make_pool() {
  pool = static_cast<Pool*>(std::aligned_alloc(alignof(Pool), sizeof(Pool)));
  if (pool != nullptr) new (pool) Pool;
}

// Once by pthread: a static variable of a function would need the C++ library for its guard, and a thread's variable with a
// destructor would need it too. The module does without that library.
Pool* the_pool() {
  pthread_once(&made_once, [] {
    make_pool();
    // The parent's threads did not come along, and its locks may be held by them: the child begins anew.
    pthread_atfork(nullptr, nullptr, make_pool);
  });
  return pool;
}

// Each thread's own, until it ends.
struct Workspace {
  void* memory;
  int64_t size;
};
thread_local Workspace mine = {nullptr, 0};
pthread_key_t at_its_end;

}  // namespace

Parts split(const Layout& layout, int64_t threads, int64_t worth) {
  Parts made{};
  const int64_t size = layout.images * layout.channels * layout.length;
  int64_t parts = threads < kMostParts ? threads : kMostParts;
  if (parts > size / (worth > 0 ? worth : 1)) parts = size / (worth > 0 ? worth : 1);
  const bool positions = layout.images == 1 && layout.length > 1;
  const int64_t all = positions ? layout.length : layout.images;
  int64_t step = parts > 1 ? (all + parts - 1) / parts : all;
  if (positions && parts > 1) step = (step + kAligned - 1) / kAligned * kAligned;
  if (step < 1) step = 1;
  for (int64_t at = 0; at < all || made.count == 0; at += step) {
    const int64_t stop = at + step < all ? at + step : all;
    made.part[made.count++] = positions ? Part{0, 1, at, stop} : Part{at, stop, 0, layout.length};
  }
  return made;
}

void over(int count, void (*call)(void*, int), void* context) {
  Job job{call, context, count};
  Pool* shared = count > 1 ? the_pool() : nullptr;
  if (shared == nullptr) return job.work();
  shared->over(job);
}

void* workspace(int64_t bytes) {
  if (bytes > mine.size || mine.memory == nullptr) {
    pthread_once(&keyed_once, [] { pthread_key_create(&at_its_end, std::free); });
    std::free(mine.memory);
    const size_t rounded = (static_cast<size_t>(bytes < 64 ? 64 : bytes) + 4095) / 4096 * 4096;
    mine.memory = std::aligned_alloc(64, rounded);
    mine.size = mine.memory != nullptr ? static_cast<int64_t>(rounded) : 0;
    pthread_setspecific(at_its_end, mine.memory);
  }
  return mine.memory;
}

}  // namespace bnlayer
