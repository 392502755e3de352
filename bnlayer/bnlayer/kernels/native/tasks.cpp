// A pass by several threads: a pool that lives as long as the process, and is made anew in a fork.

#include "tasks.hpp"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace bnlayer {
namespace {

constexpr int64_t kAligned = 64;  // positions: parts of a run begin where a vector does
constexpr int kPatience =
    20'000;  // turns of a loop, some tens of microseconds: to wake a thread takes longer than most passes

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  void (*call)(void*, int);
  void* context;
  int count;
  std::atomic<int> next{0};
  std::atomic<int> users{0};  // threads of the pool that work on it; changed under the pool's lock

  void work() {
    for (int i = next.fetch_add(1); i < count; i = next.fetch_add(1)) call(context, i);
  }
};

class Pool {
 public:
  void over(Job& job) {
    if (pthread_mutex_trylock(&busy_) != 0) return job.work();  // another thread's pass has the pool
    publish(job);
    job.work();
    retire(job);
    pthread_mutex_unlock(&busy_);
  }

 private:
  void publish(Job& job) {
    pthread_mutex_lock(&lock_);
    while (threads_ < job.count - 1 && start()) ++threads_;
    job_ = &job;
    number_.fetch_add(1, std::memory_order_release);
    if (asleep_ > 0) pthread_cond_broadcast(&wake_);
    pthread_mutex_unlock(&lock_);
  }

  void retire(Job& job) {
    pthread_mutex_lock(&lock_);
    job_ = nullptr;  // nobody else takes it up
    pthread_mutex_unlock(&lock_);
    for (int turn = 0; job.users.load() > 0 && turn < kPatience; ++turn) pause();
    pthread_mutex_lock(&lock_);
    while (job.users.load() > 0) pthread_cond_wait(&done_, &lock_);
    pthread_mutex_unlock(&lock_);
  }

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
      for (int turn = 0; number_.load(std::memory_order_acquire) == seen && turn < kPatience; ++turn) pause();
      pthread_mutex_lock(&lock_);
      ++asleep_;
      while (number_.load(std::memory_order_relaxed) == seen) pthread_cond_wait(&wake_, &lock_);
      --asleep_;
      seen = number_.load(std::memory_order_relaxed);
      Job* job = job_;
      if (job != nullptr) job->users.fetch_add(1);
      pthread_mutex_unlock(&lock_);
      if (job == nullptr) continue;
      job->work();
      pthread_mutex_lock(&lock_);
      if (job->users.fetch_sub(1) == 1) pthread_cond_signal(&done_);
      pthread_mutex_unlock(&lock_);
    }
  }

  pthread_mutex_t busy_ = PTHREAD_MUTEX_INITIALIZER, lock_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER, done_ = PTHREAD_COND_INITIALIZER;
  std::atomic<unsigned> number_{0};
  int threads_ = 0, asleep_ = 0;
  Job* job_ = nullptr;
};

Pool* pool = nullptr;
pthread_once_t made_once = PTHREAD_ONCE_INIT, keyed_once = PTHREAD_ONCE_INIT;

void make_pool() {
  pool = static_cast<Pool*>(std::malloc(sizeof(Pool)));
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
