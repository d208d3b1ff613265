/* The whole engine against a shadow: a pager in C serves a toy format, several threads write, read,
 * discard and zero at random, and every read is compared.  Run under ASan+UBSan and TSan.
 *
 * In a failing run the pager's answers and the host's writes fail at random.  A sector whose write
 * failed then holds the old bytes or the new, nothing else, and the engine goes on.
 *
 * Toy format: cluster c of the top image lies at table[c] (0: absent, 1: zero) of one sparse file;
 * absent clusters show the parent, which is every third cluster compressed (made up by the pager),
 * every third a flat file, and the rest nothing. */
#include "harness.h"

enum { THREADS = 4, LEAF_UNITS = 256 };

static uint32_t unit_shift, cluster_shift;
static uint64_t disk_size, clusters, rounds, all_failures;
static uint64_t *table;     /* the toy format's, pager thread only */
static uint64_t next_host;
static uint8_t *shadow;
static uint32_t flags_of_run, run_number;
static bool fail_some, users_done;

static uint64_t random_of(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint8_t parent_byte(uint64_t offset) { return (offset >> 9) * 31 + offset % 251 + 1; }

/* In a failing run, in the pager's thread. */
static bool now_and_then(void)
{
    static uint64_t count;
    return fail_some && ++count % 7 == 0;
}

static void fill(const struct vm_fault *fault)
{
    uint64_t entries[LEAF_UNITS] = {0};
    for (uint64_t i = 0; i < LEAF_UNITS; i++) {
        uint64_t guest = fault->offset + (i << unit_shift);
        uint64_t cluster = guest >> cluster_shift;
        if (guest >= disk_size)
            break;
        uint64_t within = guest - (cluster << cluster_shift);
        if (table[cluster] > 1)
            entries[i] = (uint64_t)VM_DATA << 60 | 0ull << 52 | (table[cluster] + within) >> 9;
        else if (table[cluster] == 1)
            entries[i] = (uint64_t)VM_ZERO << 60;
        else if (cluster % 3 == 0)
            entries[i] = (uint64_t)VM_COMPRESSED << 60 | 1ull << 52;
        else if (cluster % 3 == 1)
            entries[i] = (uint64_t)VM_DATA << 60 | 1ull << 52 | guest >> 9;
    }
    assert(vm_fill(engine, fault->id, entries, LEAF_UNITS, now_and_then() ? -EIO : 0) == 0);
}

static void inflate(const struct vm_fault *fault)
{
    uint64_t size = 1ull << cluster_shift;
    uint64_t start = fault->offset & ~(size - 1);
    uint8_t *data = malloc(size);
    for (uint64_t i = 0; i < size; i++)
        data[i] = parent_byte(start + i);
    assert(fault->arg == 1);
    assert(vm_inflated(engine, fault->id, start, data, size, now_and_then() ? -EIO : 0) == 0);
    free(data);
}

static void commit(void)
{
    struct vm_dirty dirty[1024];
    int count;
    while ((count = vm_dirty_take(engine, dirty, 1024)) > 0) {
        for (int i = 0; i < count; i++) {
            assert(i == 0 || dirty[i].cluster > dirty[i - 1].cluster);
            table[dirty[i].cluster] = dirty[i].host_offset;
        }
        for (int i = 0; i < 20; i++)
            sched_yield();  // flushes and writes come meanwhile
        vm_dirty_done(engine, 0);
    }
    assert(count == 0);
}

static void zero(const struct vm_fault *fault)
{
    commit();
    vm_drain(engine);
    uint64_t size = 1ull << cluster_shift;
    assert(fault->offset % size == 0 && fault->length);
    for (uint64_t at = fault->offset; at < fault->offset + fault->length; at += size)
        table[at >> cluster_shift] = 1;
    vm_answer(engine, fault->id, 0);
}

static void *pager(void *unused)
{
    struct vm_fault faults[16];
    int count;
    while ((count = vm_faults_wait(engine, faults, 16, 50)) >= 0) {
        for (int i = 0; i < count; i++) {
            switch (faults[i].type) {
            case VM_FAULT_FILL:
                fill(&faults[i]);
                break;
            case VM_FAULT_INFLATE:
                inflate(&faults[i]);
                break;
            case VM_FAULT_REFILL:
                if (now_and_then()) {
                    vm_answer(engine, faults[i].id, -ENOSPC);
                    break;
                }
                vm_pool_add(engine, 0, next_host, faults[i].arg + 3, 0);
                next_host += (faults[i].arg + 3) << cluster_shift;
                // A gap, so that the pool is not one run for ever.
                vm_pool_add(engine, 0, next_host + (1ull << cluster_shift), 2, 1);
                next_host += 3ull << cluster_shift;
                vm_answer(engine, faults[i].id, 0);
                break;
            case VM_FAULT_FLUSH:
                commit();
                fdatasync(files[0]);
                vm_answer(engine, faults[i].id, 0);
                break;
            case VM_FAULT_DISCARD:
            case VM_FAULT_ZERO:
                zero(&faults[i]);
                break;
            case VM_FAULT_BEGIN:
                vm_answer(engine, faults[i].id, 0);
                break;
            default:
                assert(fail_some
                       && (faults[i].type == VM_FAULT_LOST || faults[i].type == VM_FAULT_FAILED));
            }
        }
        if (!count)
            commit();
    }
    return unused;
}

/* No host file may grow past a limit that comes and goes, so that writes stop short and fail. */
static void *limit_host(void *unused)
{
    uint64_t seed = 4711;
    while (!__atomic_load_n(&users_done, __ATOMIC_SEQ_CST)) {
        struct rlimit limit = {random_of(&seed) % 40000 * 512, RLIM_INFINITY};
        if (random_of(&seed) % 4)
            limit.rlim_cur = RLIM_INFINITY;
        assert(!setrlimit(RLIMIT_FSIZE, &limit));
        for (int i = random_of(&seed) % 50; i; i--)
            sched_yield();
    }
    struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
    assert(!setrlimit(RLIMIT_FSIZE, &none));
    return unused;
}

static void must_read(uint64_t at, uint64_t length, uint8_t *data)
{
    int error;
    while ((error = vm_io(engine, VM_OP_READ, at, length, data, 0)))
        assert(fail_some && error == -EIO);
}

/* What a failed write left: of each sector the old bytes or the new (or zeros where new is NULL). */
static void take_what_is_there(uint64_t at, uint64_t length, const uint8_t *new)
{
    static const uint8_t zeros[512];
    uint8_t *data = malloc(length);
    must_read(at, length, data);
    for (uint64_t i = 0; i < length; i += 512)
        assert(!memcmp(data + i, shadow + at + i, 512)
               || !memcmp(data + i, new ? new + i : zeros, 512));
    memcpy(shadow + at, data, length);
    free(data);
}

static pthread_rwlock_t others = PTHREAD_RWLOCK_INITIALIZER;

/* Whole clusters lose what they hold, so that they are allocated anew.  Nobody else may write then,
 * or the shadow would not know who was first; test_discard.c does without that. */
static void discard_some(uint64_t *seed)
{
    uint64_t size = 1ull << cluster_shift;
    uint64_t at = random_of(seed) % clusters * size;
    uint64_t length = (1 + random_of(seed) % ((1 << 20) / size)) * size;
    uint32_t op = random_of(seed) % 2 ? VM_OP_DISCARD : VM_OP_WRITE_ZEROES;
    if (at > disk_size - length)
        at = 0;
    pthread_rwlock_wrlock(&others);
    int error = vm_io(engine, op, at, length, NULL, 0);
    assert(!error || fail_some);
    if (error)
        take_what_is_there(at, length, NULL);
    else if (op == VM_OP_WRITE_ZEROES || flags_of_run & VM_CAN_DISCARD)
        memset(shadow + at, 0, length);
    pthread_rwlock_unlock(&others);
}

/* Threads own interleaved stripes that are not cluster aligned, so that they share clusters. */
static void *user(void *argument)
{
    uint64_t self = (uint64_t)(uintptr_t)argument;
    uint64_t seed = 88172645463325252ull + self * 7919 + run_number * 104729;
    uint64_t stripe = 24 * 512;
    uint8_t *data = malloc(stripe);
    uint64_t failures = 0;
    for (uint64_t round = 0; round < rounds; round++) {
        uint64_t stripes = disk_size / stripe / THREADS;
        uint64_t base = (random_of(&seed) % stripes * THREADS + self) * stripe;
        uint64_t first = random_of(&seed) % 24, count = 1 + random_of(&seed) % (24 - first);
        uint64_t at = base + first * 512, length = count * 512;
        uint32_t flags = random_of(&seed) % 8 ? 0 : VM_IO_FUA;
        if (random_of(&seed) % 32 == 0)
            discard_some(&seed);
        pthread_rwlock_rdlock(&others);
        int error = 0;
        switch (random_of(&seed) % 8) {
        case 0: case 1: case 2:
            memset(data, (int)random_of(&seed), length);
            error = vm_io(engine, VM_OP_WRITE, at, length, data, flags);
            if (error)
                take_what_is_there(at, length, data);
            else
                memcpy(shadow + at, data, length);
            break;
        case 3:
            flags |= random_of(&seed) % 2 ? VM_IO_NOUNMAP : 0;
            error = vm_io(engine, VM_OP_WRITE_ZEROES, at, length, NULL, flags);
            if (error)
                take_what_is_there(at, length, NULL);
            else
                memset(shadow + at, 0, length);
            break;
        case 4:
            if (random_of(&seed) % 4 == 0)
                assert(!vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0));
            break;
        default:
            must_read(at, length, data);
            assert(!memcmp(data, shadow + at, length));
        }
        assert(!error || (fail_some && (error == -ENOSPC || error == -EFBIG || error == -EIO)));
        pthread_rwlock_unlock(&others);
        failures += error != 0;
    }
    __atomic_fetch_add(&all_failures, failures, __ATOMIC_SEQ_CST);
    free(data);
    return NULL;
}

static void compare_all(void)
{
    uint8_t *data = malloc(disk_size);
    for (uint64_t at = 0; at < disk_size; at += 1 << 18)
        must_read(at, disk_size - at < 1 << 18 ? disk_size - at : 1 << 18, data + at);
    for (uint64_t i = 0; i < disk_size; i++)
        if (data[i] != shadow[i]) {
            fprintf(stderr, "byte %llu: %u, expected %u\n", (unsigned long long)i, data[i], shadow[i]);
            abort();
        }
    free(data);
}

static void run(uint32_t unit, uint32_t cluster, uint32_t flags, bool failing)
{
    pthread_t threads[THREADS], pager_thread, limiter;
    int parent_fd = temporary();
    unit_shift = unit;
    cluster_shift = cluster;
    fail_some = failing;
    flags_of_run = flags;
    disk_size = 4u << 20;
    disk_size += 512 * 5;
    clusters = (disk_size >> cluster) + 1;
    table = calloc(clusters, sizeof *table);
    shadow = calloc(1, disk_size);
    next_host = 1 << 20;
    users_done = false;
    for (uint64_t c = 0; c < clusters; c++)
        for (uint64_t i = c << cluster; c % 3 != 2 && i < (c + 1) << cluster && i < disk_size; i++)
            shadow[i] = parent_byte(i);
    assert(pwrite(parent_fd, shadow, disk_size, 0) == (ssize_t)disk_size);
    struct vm_config config = {.size = disk_size, .sector_size = 512, .unit_shift = unit,
                               .cluster_shift = cluster, .leaf_units = LEAF_UNITS, .flags = flags,
                               /* two leaves */
                               .map_bytes = 5 << 10};
    while ((uint64_t)config.leaf_units << unit < 1u << 20)
        assert(!"leaf too small");
    create(&config);
    add_file(temporary(), true);
    add_file(parent_fd, false);
    start_loop();
    pthread_create(&pager_thread, NULL, pager, NULL);
    compare_all();
    for (uint64_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, user, (void *)(uintptr_t)i);
    if (failing)
        pthread_create(&limiter, NULL, limit_host, NULL);
    for (uint64_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    __atomic_store_n(&users_done, true, __ATOMIC_SEQ_CST);
    if (failing)
        pthread_join(limiter, NULL);
    compare_all();
    assert(!vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0));
    if (!failing)
        assert(!vm_io(engine, VM_OP_DISCARD, 0, disk_size, NULL, 0));
    if (!failing && flags & VM_CAN_DISCARD)
        memset(shadow, 0, disk_size);
    compare_all();
    struct vm_stats now = stats();
    assert(now.in_flight == 0 && now.failed == 0);
    vm_engine_stop(engine);
    join_loop();
    pthread_join(pager_thread, NULL);
    assert(vm_io(engine, VM_OP_READ, 0, 512, shadow, 0) == -ESHUTDOWN);
    destroy();
    free(table);
    free(shadow);
    printf("unit 2^%u cluster 2^%u flags %u failing %d: %llu allocations, %llu copies\n", unit,
           cluster, flags, failing, (unsigned long long)now.allocations,
           (unsigned long long)now.copies);
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 400;
    for (run_number = 0; run_number < 3; run_number++) {
        run(12, 16, VM_CAN_ZERO | VM_CAN_DISCARD, false);
        run(12, 16, VM_CAN_ZERO | VM_CAN_DISCARD, true);
        run(16, 16, 0, true);
        run(12, 12, VM_CAN_ZERO | VM_CAN_DISCARD, false);
        run(12, 20, 0, false);
        run(14, 19, VM_WRITETHROUGH | VM_CAN_ZERO, false);
    }
    assert(all_failures > 0);
    return 0;
}
