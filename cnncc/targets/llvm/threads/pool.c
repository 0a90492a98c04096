/* The threads of an engine: what every engine runs its parallel loops on.
 *
 * This file is the source of pool.ll, which generate.py makes of it and every build assembles for its own target. So
 * that one text serves x86-64, AArch64, RISC-V and 32-bit ARM alike:
 *
 *  - nothing depends on the size of a pointer: fields that hold one are 8 bytes wide, every offset is fixed and checked;
 *  - of libc it calls only what takes ints and pointers, with the same meaning of every constant on all of them. No
 *    size_t, no struct timespec, no pthread_cond_t: engines are linked without symbol versions, and on x86-64 such a
 *    reference finds glibc's condition variables of 2002, which allocate memory. Semaphores have one version only;
 *  - the memory comes from the caller.
 *
 * How a parallel loop is shared. Each participant (the launching thread is number 0) gets a contiguous run of the
 * iterations, as a static schedule would give it, so that from one loop to the next a core finds in its cache what it
 * wrote there. It takes them from the front of its run, one at a time; whoever has none left takes from the back of the
 * others'. So a worker that comes late, because another program or another pool of the same process holds its core,
 * finds its run done by the others, and nobody has waited for it: the launching thread waits only for iterations that
 * somebody is in the middle of.
 *
 * Why this is right. All that a launch needs to say is written before the runs are, and a run is published by a release
 * store to `range`. A claim is a compare-and-swap of that word which acquires it, and claims keep the word's release
 * sequence alive, so:
 *
 *  (1) Each iteration is claimed once: runs do not overlap, and a successful claim takes one iteration off the word.
 *  (2) Whoever has claimed an iteration sees the lambda and the data of the launch it belongs to. A worker may look at
 *      a run long after the launch that it was woken for: then it claims an iteration of a later launch, which is just
 *      as good, since it reads lambda and data after the claim only. They cannot change under it: a launch ends when
 *      `remaining` is 0, and an iteration that is claimed is still counted there.
 *  (3) A participant subtracts what it did when it finds no more work. Until then the launch cannot end, so all that it
 *      adds up belongs to one launch. The subtractions release and the launching thread acquires `remaining`: what the
 *      iterations wrote is visible when the launch returns.
 *  (4) No wake-up is lost: see await().
 */

#include <stdatomic.h>
#include <stdint.h>

/* libc, declared here so that the headers of one system do not slip in. A pthread_t is a pointer or an unsigned long:
 * both are passed alike. */
int pthread_create(void **thread, const void *attributes, void *(*function)(void *), void *argument);
int pthread_join(void *thread, void **result);
int pthread_sigmask(int how, const void *set, void *old);
int sigfillset(void *set);
int sigdelset(void *set, int signal);
int sem_init(void *semaphore, int shared, unsigned value);
int sem_post(void *semaphore);
int sem_wait(void *semaphore);
int sem_destroy(void *semaphore);
int sched_yield(void);

/* Tells the processor that this thread spins; the build writes its body for the target. */
void cnncc_pause(void);

enum {
    MOST_THREADS = 4096,
    MOST_TASKS = 1 << 20, /* fits the 24 bits of a bound; longer loops go in runs of several iterations */

    /* Looks at the next launch before a worker sleeps. A look takes 30 ns on a Zen 3, up to twice that on other cores:
     * about 100 microseconds in all. The serial gaps within an inference are shorter, and to wake a sleeper takes the
     * launching thread some microseconds and the sleeper some tens. */
    IDLE_LOOKS = 4000,
    /* Looks at iterations in flight before the launching thread offers its core to whoever is in the middle of one. */
    WAITING_LOOKS = 2000,

    /* As on every Linux but MIPS. */
    SIG_SETMASK_ = 2,
    SIGILL_ = 4,
    SIGBUS_ = 7,
    SIGFPE_ = 8,
    SIGSEGV_ = 11,
};

/* A pointer that takes 8 bytes everywhere; the integer comes first so that the compiler sees 8 bytes, not a pointer. */
typedef union {
    int64_t width;
    void *pointer;
} Pointer;

/* What TVM's code hands to a loop's body, {void *handle; int32_t tasks;}: where a pointer has 4 bytes, `tasks` is the
 * second word, else the third. Both are set; the handle is for barriers, which no code of ours has. */
typedef struct {
    int32_t words[4];
} Environment;

typedef int (*Lambda)(int task, Environment *environment, void *data);

typedef struct {
    _Atomic uint64_t range; /* launch (16 bits), begin (24), end (24): begin to end - 1 are unclaimed */
    char pad_range[120];    /* two cache lines: processors fetch neighbours in pairs */
    _Atomic int32_t sleeping;
    int32_t number;
    Pointer pool;
    Pointer thread;
    _Alignas(8) char semaphore[64]; /* a sem_t takes 16 or 32 */
    char pad_end[40];
} Participant;

typedef struct {
    _Atomic uint32_t launches; /* counts up; idle workers look at it */
    _Atomic int32_t closing;
    char pad_launches[120];

    _Atomic int32_t busy; /* somebody is launching */
    int32_t width;
    char pad_busy[120];

    Pointer lambda; /* of the launch: written while nothing is claimed, read after a claim */
    Pointer data;
    Environment environment;
    char pad_work[96];

    _Atomic int32_t remaining; /* iterations that are not known to be done */
    _Atomic int32_t error;     /* the first code other than 0 that an iteration returned */
    char pad_remaining[120];

    Participant participants[];
} Pool;

#define AT(type, field, offset) _Static_assert(__builtin_offsetof(type, field) == (offset), #field)
AT(Participant, sleeping, 128);
AT(Participant, number, 132);
AT(Participant, pool, 136);
AT(Participant, thread, 144);
AT(Participant, semaphore, 152);
AT(Pool, closing, 4);
AT(Pool, busy, 128);
AT(Pool, width, 132);
AT(Pool, lambda, 256);
AT(Pool, data, 264);
AT(Pool, environment, 272);
AT(Pool, remaining, 384);
AT(Pool, error, 388);
AT(Pool, participants, 512);
_Static_assert(sizeof(Participant) == 256, "a participant");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a range is claimed without a lock");

static _Thread_local Pool *current;  /* what this thread launches on; none: it runs loops by itself */
static _Thread_local int64_t extent; /* iterations of the loop that this thread is about to launch; 0: unknown */

static void set_tasks(Environment *environment, int32_t tasks) {
    environment->words[0] = 0;
    environment->words[1] = tasks;
    environment->words[2] = tasks;
    environment->words[3] = 0;
}

static uint64_t packed(uint32_t launch, uint32_t begin, uint32_t end) {
    return (uint64_t)(launch & 0xffff) << 48 | (uint64_t)begin << 24 | end;
}

/* Take one iteration off a run, from its front or its back; -1 where nothing is left. */
static int claim(_Atomic uint64_t *range, int from_back) {
    uint64_t word = atomic_load_explicit(range, memory_order_relaxed);
    for (;;) {
        uint32_t begin = word >> 24 & 0xffffff, end = word & 0xffffff;
        if (begin >= end)
            return -1;
        uint64_t left = from_back ? word - 1 : word + (1 << 24);
        if (atomic_compare_exchange_weak_explicit(range, &word, left, memory_order_acquire, memory_order_relaxed))
            return (int)(from_back ? end - 1 : begin);
    }
}

/* Do what there is to do: one's own run, then what the others have not begun. */
static void work(Pool *pool, int32_t number) {
    int32_t done = 0;
    for (int32_t step = 0; step < pool->width; ++step) {
        int32_t victim = number + step < pool->width ? number + step : number + step - pool->width;
        int task;
        while ((task = claim(&pool->participants[victim].range, step > 0)) >= 0) {
            Lambda lambda = (Lambda)pool->lambda.pointer;
            int code = lambda(task, &pool->environment, pool->data.pointer);
            int32_t none = 0;
            if (code)
                atomic_compare_exchange_strong_explicit(&pool->error, &none, code, memory_order_relaxed,
                                                        memory_order_relaxed);
            ++done;
        }
    }
    if (done)
        atomic_fetch_sub_explicit(&pool->remaining, done, memory_order_acq_rel);
}

/* Wait for a launch after the one that was seen last; return its number.
 *
 * A worker sleeps between setting `sleeping` and somebody's taking it back. The launching thread counts up, then looks
 * at the flag; the worker sets the flag, then looks at the count. All four are sequentially consistent, so at least one
 * sees what the other did. Whoever takes the flag back owns the wake-up: where the launching thread does, it posts
 * once, and the worker waits for just that post; where the worker does, nobody posts. The semaphore is 0 whenever the
 * worker is awake. */
static uint32_t await(Pool *pool, Participant *self, uint32_t seen) {
    for (int look = 0; look < IDLE_LOOKS; ++look) {
        uint32_t now = atomic_load_explicit(&pool->launches, memory_order_acquire);
        if (now != seen)
            return now;
        cnncc_pause();
    }
    atomic_store(&self->sleeping, 1);
    uint32_t now = atomic_load(&pool->launches);
    if (now != seen && atomic_exchange(&self->sleeping, 0))
        return now;
    while (sem_wait(self->semaphore)) {
        /* a debugger interrupted it */
    }
    return atomic_load_explicit(&pool->launches, memory_order_acquire);
}

static void *serve(void *argument) {
    Participant *self = argument;
    Pool *pool = self->pool.pointer;
    uint32_t seen = 0;
    for (;;) {
        seen = await(pool, self, seen);
        if (atomic_load_explicit(&pool->closing, memory_order_acquire))
            return 0;
        work(pool, self->number);
    }
}

/* Count up, so that workers look for work; wake the first few of those that sleep. */
static void announce(Pool *pool, int32_t wanted) {
    atomic_fetch_add(&pool->launches, 1);
    for (int32_t number = 1; number < wanted; ++number) {
        Participant *worker = &pool->participants[number];
        if (atomic_load(&worker->sleeping) && atomic_exchange(&worker->sleeping, 0))
            sem_post(worker->semaphore);
    }
}

/* Bytes that a pool needs, at an address that is a multiple of 128. */
int64_t cnncc_pool_bytes(int32_t threads) { return sizeof(Pool) + (int64_t)threads * sizeof(Participant); }

/* End the workers. Launches go on without them, but the memory must stay while there are any. */
void cnncc_pool_close(void *memory) {
    Pool *pool = memory;
    atomic_store(&pool->closing, 1);
    announce(pool, pool->width);
    for (int32_t number = 1; number < pool->width; ++number) {
        pthread_join(pool->participants[number].thread.pointer, 0);
        sem_destroy(pool->participants[number].semaphore);
    }
}

/* Make a pool in memory that is all zeros; return 0, or the error that kept its threads from being started.
 *
 * The workers take no signals, those of broken code apart: the program's handlers run where the program expects them. */
int cnncc_pool_open(void *memory, int32_t threads) {
    Pool *pool = memory;
    if (threads < 1 || threads > MOST_THREADS)
        return 22; /* EINVAL */
    _Alignas(8) char all[128], before[128]; /* a sigset_t takes at most 128 */
    sigfillset(all);
    sigdelset(all, SIGILL_);
    sigdelset(all, SIGBUS_);
    sigdelset(all, SIGFPE_);
    sigdelset(all, SIGSEGV_);
    pthread_sigmask(SIG_SETMASK_, all, before);
    int code = 0;
    /* Only the launching thread reads the width while threads are started: until something is launched, workers sleep
     * or look at `launches`, whose increments publish it. */
    for (pool->width = 1; pool->width < threads; ++pool->width) {
        Participant *worker = &pool->participants[pool->width];
        worker->number = pool->width;
        worker->pool.pointer = pool;
        sem_init(worker->semaphore, 0, 0);
        code = pthread_create(&worker->thread.pointer, 0, serve, worker);
        if (code)
            break;
    }
    pthread_sigmask(SIG_SETMASK_, before, 0);
    if (code)
        cnncc_pool_close(pool);
    return code;
}

/* Say what the calling thread launches on from now on; none: it runs loops by itself. */
void cnncc_pool_enter(void *memory) { current = memory; }

/* Say how many iterations the loop has that the calling thread launches next. */
void cnncc_region(int64_t iterations) { extent = iterations; }

/* Run a loop's body for every task; TVM's TVMBackendParallelLaunch.
 *
 * The code that TVM makes of a loop's body divides the loop into environment.tasks runs and does the one that it is
 * told: with as many tasks as iterations, a task is an iteration. */
int cnncc_parallel_launch(Lambda lambda, void *data, int tasks) {
    (void)tasks; /* 0: as many as there are threads */
    Pool *pool = current;
    int64_t iterations = extent;
    extent = 0;
    /* A pool that is busy is launching already: the loop lies within another, or a second thread uses the pool. */
    if (!pool || pool->width == 1 || iterations <= 1 ||
        atomic_exchange_explicit(&pool->busy, 1, memory_order_acquire)) {
        Environment alone;
        set_tasks(&alone, 1);
        return lambda(0, &alone, data);
    }
    int32_t count = iterations < MOST_TASKS ? (int32_t)iterations : MOST_TASKS, width = pool->width;
    uint32_t launch = atomic_load_explicit(&pool->launches, memory_order_relaxed) + 1;
    pool->lambda.pointer = (void *)lambda;
    pool->data.pointer = data;
    set_tasks(&pool->environment, count);
    atomic_store_explicit(&pool->error, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->remaining, count, memory_order_relaxed);
    /* In floating point, exact for numbers this small: not every ARM divides integers, and those that do not would call
     * a library that engines are not linked with. */
    int32_t share = (int32_t)((double)count / width), longer = count - share * width, begin = 0;
    for (int32_t number = 0; number < width; ++number) {
        int32_t end = begin + share + (number < longer);
        atomic_store_explicit(&pool->participants[number].range, packed(launch, begin, end), memory_order_release);
        begin = end;
    }
    announce(pool, count < width ? count : width);
    work(pool, 0);
    for (int look = 0; atomic_load_explicit(&pool->remaining, memory_order_acquire); ++look) {
        if (look < WAITING_LOOKS)
            cnncc_pause();
        else
            sched_yield();
    }
    int code = atomic_load_explicit(&pool->error, memory_order_relaxed);
    atomic_store_explicit(&pool->busy, 0, memory_order_release);
    return code;
}
