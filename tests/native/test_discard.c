/* Discards and zeroes of many leaves at once among writers of single sectors, with a Pager that gives
 * freed host clusters to the next write at once.  Each sector is stamped with its number and a count:
 * what is read must be the last stamp, or zeros where a discard ran meanwhile, and never another
 * sector's. */
#include "harness.h"

enum { UNIT = 4 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 256, WRITERS = 4 };
#define DISK (3ull * MIB + 5 * 512)
#define CLUSTERS ((DISK + CLUSTER - 1) / CLUSTER)

static uint64_t table[CLUSTERS];  /* 0: absent, 1: zero, else the host offset */
static uint64_t next_host, reused;
static uint64_t begun_count, ended_count;  /* discards */
static bool writers_done;

static uint64_t random_of(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state >> 8;
}

static void fill(const struct vm_fault *fault)
{
    uint64_t entries[LEAF_UNITS] = {0};
    for (uint64_t i = 0; i < LEAF_UNITS && fault->offset + i * UNIT < DISK; i++) {
        uint64_t guest = fault->offset + i * UNIT, host = table[guest / CLUSTER];
        if (host > 1)
            entries[i] = (uint64_t)VM_DATA << 60 | (host + guest % CLUSTER) >> 9;
        else
            entries[i] = host << 60;
    }
    vm_fill(engine, fault->id, entries, LEAF_UNITS, 0);
}

static void commit(void)
{
    struct vm_dirty dirty[32];
    int count;
    while ((count = vm_dirty_take(engine, dirty, 32)) > 0) {
        for (int i = 0; i < count; i++) {
            assert(table[dirty[i].cluster] <= 1);
            table[dirty[i].cluster] = dirty[i].host_offset;
        }
        vm_dirty_done(engine, 0);
    }
    assert(count == 0);
}

static void discard(const struct vm_fault *fault)
{
    commit();
    assert(fault->offset % CLUSTER == 0 && fault->length);
    for (uint64_t at = fault->offset; at < fault->offset + fault->length; at += CLUSTER) {
        uint64_t host = table[at / CLUSTER];
        table[at / CLUSTER] = 1;
        if (host <= 1)
            continue;
        assert(!fallocate(files[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, host, CLUSTER));
        vm_pool_add(engine, 0, host, 1, 1);
        reused++;
    }
    vm_answer(engine, fault->id, 0);
}

static void *pager(void *unused)
{
    struct vm_fault fault;
    uint64_t seed = 1;
    while (vm_faults_wait(engine, &fault, 1, -1) == 1) {
        switch (fault.type) {
        case VM_FAULT_FILL:
            fill(&fault);
            break;
        case VM_FAULT_REFILL:
            vm_pool_add(engine, 0, next_host, 2, 0);
            next_host += 3 * CLUSTER;
            vm_answer(engine, fault.id, 0);
            break;
        case VM_FAULT_DISCARD:
        case VM_FAULT_ZERO:
            if (fault.type == VM_FAULT_ZERO && random_of(&seed) % 8 == 0)
                vm_answer(engine, fault.id, -EOPNOTSUPP);  // then zeros are written
            else
                discard(&fault);
            break;
        case VM_FAULT_FLUSH:
            commit();
            vm_answer(engine, fault.id, 0);
            break;
        default:
            assert(fault.type == VM_FAULT_BEGIN);
            vm_answer(engine, fault.id, 0);
        }
    }
    return unused;
}

/* Writer w owns the sectors that leave w when divided by WRITERS. */
static void *writer(void *argument)
{
    uint64_t self = (uintptr_t)argument, seed = 88172645463325252ull + self * 7919;
    for (uint64_t count = 1; count <= 1200; count++) {
        uint64_t data[64], sector = random_of(&seed) % (DISK / 512 / WRITERS) * WRITERS + self;
        for (int i = 0; i < 64; i++)
            data[i] = sector << 32 | count;
        uint64_t before = __atomic_load_n(&begun_count, __ATOMIC_SEQ_CST);
        bool quiet = before == __atomic_load_n(&ended_count, __ATOMIC_SEQ_CST);
        assert(vm_io(engine, VM_OP_WRITE, sector * 512, 512, data, 0) == 0);
        assert(vm_io(engine, VM_OP_READ, sector * 512, 512, data, 0) == 0);
        quiet = quiet && before == __atomic_load_n(&begun_count, __ATOMIC_SEQ_CST);
        for (int i = 0; i < 64; i++)
            assert(data[i] == (sector << 32 | count) || (data[i] == 0 && !quiet));
        uint64_t other = random_of(&seed) % (DISK / 512);
        assert(vm_io(engine, VM_OP_READ, other * 512, 512, data, 0) == 0);
        for (int i = 0; i < 64; i++)
            assert(data[i] == 0 || data[i] >> 32 == other);
        if (count % 200 == 0)
            assert(vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0) == 0);
    }
    return NULL;
}

static void *discarder(void *argument)
{
    uint64_t seed = 1234567 + (uintptr_t)argument;
    while (!__atomic_load_n(&writers_done, __ATOMIC_SEQ_CST)) {
        uint64_t start = random_of(&seed) % 3 ? random_of(&seed) % (DISK / 512) * 512 : 0;
        uint64_t length = random_of(&seed) % 3 ? DISK - start
                                               : (random_of(&seed) % ((DISK - start) / 512) + 1) * 512;
        __atomic_fetch_add(&begun_count, 1, __ATOMIC_SEQ_CST);
        assert(vm_io(engine, random_of(&seed) % 2 ? VM_OP_DISCARD : VM_OP_WRITE_ZEROES, start, length,
                     NULL, 0) == 0);
        __atomic_fetch_add(&ended_count, 1, __ATOMIC_SEQ_CST);
        for (int i = random_of(&seed) % 64; i; i--)
            sched_yield();
    }
    return NULL;
}

int main(void)
{
    pthread_t pager_thread, writers[WRITERS], discarders[2];
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS, .map_bytes = 5 * KIB,
                               .flags = VM_CAN_ZERO | VM_CAN_DISCARD};
    create(&config);
    add_file(temporary(), true);
    next_host = MIB;
    start_loop();
    pthread_create(&pager_thread, NULL, pager, NULL);
    for (uintptr_t i = 0; i < 2; i++)
        pthread_create(&discarders[i], NULL, discarder, (void *)i);
    for (uintptr_t i = 0; i < WRITERS; i++)
        pthread_create(&writers[i], NULL, writer, (void *)i);
    for (int i = 0; i < WRITERS; i++)
        pthread_join(writers[i], NULL);
    __atomic_store_n(&writers_done, true, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 2; i++)
        pthread_join(discarders[i], NULL);
    static uint8_t all[DISK];
    assert(vm_io(engine, VM_OP_WRITE_ZEROES, 0, DISK, NULL, 0) == 0);
    assert(vm_io(engine, VM_OP_READ, 0, DISK, all, 0) == 0 && all_bytes(all, DISK, 0));
    struct vm_stats now = stats();
    assert(now.in_flight == 0 && reused > 100);
    printf("%llu discards, %llu allocations, %llu reused\n", (unsigned long long)now.discards,
           (unsigned long long)now.allocations, (unsigned long long)reused);
    vm_engine_stop(engine);
    join_loop();
    pthread_join(pager_thread, NULL);
    destroy();
    return 0;
}
