/* map.c: what it says of ranges against an array of all entries, and which leaves it drops. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { UNIT = 12, CLUSTER = 14, LEAF_UNITS = 256, LEAVES = 12, PER_CLUSTER = 1 << (CLUSTER - UNIT) };
#define LEAF_BYTES ((uint64_t)LEAF_UNITS << UNIT)
#define SIZE (LEAVES * LEAF_BYTES - 5 * 512)
#define BYTES (sizeof(struct leaf) + LEAF_UNITS * sizeof(uint64_t))

static uint64_t seed = 88172645463325252ull;

static uint64_t rnd(uint64_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (seed >> 11) % below;
}

static struct map map;

static void set_up(uint64_t limit)
{
    struct vm_config config = {.size = SIZE, .unit_shift = UNIT, .cluster_shift = CLUSTER,
                               .leaf_units = LEAF_UNITS, .map_bytes = limit};
    assert(map_create(&map, &config) == 0 && map.leaf_count == LEAVES);
}

static void install(uint64_t index, uint64_t entry)
{
    uint64_t entries[LEAF_UNITS];
    for (int i = 0; i < LEAF_UNITS; i++)
        entries[i] = entry;
    assert(map_install(&map, index, entries) == 0);
}

static bool loaded(uint64_t index) { return map.leaves[index] != NULL; }

static void test_ranges_against_an_array(void)
{
    static uint64_t model[LEAVES * LEAF_UNITS];
    bool known[LEAVES] = {0};
    set_up(1 << 20);
    for (int round = 0; round < 40000; round++) {
        uint64_t at = rnd(SIZE / 512) * 512, end = at + rnd((SIZE - at) / 512 + 1) * 512;
        if (rnd(3))
            end = at + rnd(1 << 16) / 512 * 512;
        end = end < SIZE ? end : SIZE;
        uint64_t first = at >> UNIT, last = (end + (1 << UNIT) - 1) >> UNIT;
        uint64_t cluster = at >> CLUSTER, in_leaf = cluster * PER_CLUSTER / LEAF_UNITS;
        uint64_t *head = &model[cluster * PER_CLUSTER];
        switch (rnd(6)) {
        case 0:
            if (!known[in_leaf] && rnd(4) == 0) {
                uint64_t entries[LEAF_UNITS];
                for (int i = 0; i < LEAF_UNITS; i++) {
                    entries[i] = rnd(9) ? 0 : entry_make(rnd(5), rnd(256), rnd(1 << 20) << 9);
                    model[in_leaf * LEAF_UNITS + i] = entries[i];
                    entries[i] |= rnd(2) ? ENTRY_BUSY : 0;  // not for others to say
                }
                assert(map_install(&map, in_leaf, entries) == 0);
                known[in_leaf] = true;
            }
            break;
        case 1:
            if (known[in_leaf] && !(*head & ENTRY_BUSY)) {
                *head |= ENTRY_BUSY;
                *map_entry(&map, map.leaves[in_leaf], cluster << CLUSTER) |= ENTRY_BUSY;
                map.leaves[in_leaf]->busy++;
            }
            break;
        case 2:
            if (known[in_leaf] && *head & ENTRY_BUSY) {
                uint64_t host = rnd(1 << 20) << CLUSTER;
                map_publish(&map, cluster, 7, host);
                map.leaves[in_leaf]->busy--;
                for (int i = 0; i < PER_CLUSTER; i++)
                    head[i] = entry_make(VM_DATA, 7, host + ((uint64_t)i << UNIT));
            }
            break;
        case 3: {
            // As a discard does: whole clusters, or up to the disk's end, none of them busy.
            at = at >> CLUSTER << CLUSTER;
            end = rnd(8) ? end >> CLUSTER << CLUSTER : SIZE;
            if (at >= end || map_range_busy(&map, at, end))
                break;
            map_set_zero(&map, at, end);
            for (uint64_t u = at >> UNIT; u < (end + (1 << UNIT) - 1) >> UNIT; u++)
                if (known[u / LEAF_UNITS])
                    model[u] = entry_make(VM_ZERO, 0, 0);
            break;
        }
        case 4: {
            bool zero = true;
            for (uint64_t u = first; u < last; u++)
                zero = zero && known[u / LEAF_UNITS] && model[u] >> 60 <= VM_ZERO;
            assert(at == end || map_range_reads_zero(&map, at, end) == zero);
            break;
        }
        default: {
            bool busy = false;
            for (uint64_t c = at >> CLUSTER; c << CLUSTER < end; c++)
                busy = busy || model[c * PER_CLUSTER] & ENTRY_BUSY;
            assert(at == end || map_range_busy(&map, at, end) == busy);
        }
        }
    }
    for (uint64_t u = 0; u << UNIT < SIZE; u++)
        if (known[u / LEAF_UNITS])
            assert(*map_entry(&map, map.leaves[u / LEAF_UNITS], u << UNIT) == model[u]);
    map_destroy(&map);
}

static void test_the_limit_is_kept_and_the_pinned_stay(void)
{
    set_up(4 * BYTES);
    for (int i = 0; i < 4; i++)
        install(i, 0);
    map.leaves[1]->busy = 1;
    map.leaves[2]->dirty = 1;
    for (int round = 0; round < 3; round++) {
        for (uint64_t i = 3; i < LEAVES; i++) {
            if (!loaded(i))
                install(i, 0);
            assert(loaded(1) && loaded(2) && loaded(i) && map.bytes <= 4 * BYTES);
            assert(map.loaded * BYTES == map.bytes);
        }
    }
    // Rather more than the limit than losing one that is pinned.
    for (uint64_t i = 0; i < LEAVES - 1; i++) {
        install(i, 0);
        map.leaves[i]->dirty = 1;
    }
    assert(map.loaded == LEAVES - 1);
    for (uint64_t i = 0; i < LEAVES; i++)
        if (loaded(i))
            map.leaves[i]->dirty = map.leaves[i]->busy = 0;
    map.leaves[0]->busy = 1;
    assert(!loaded(LEAVES - 1));
    install(LEAVES - 1, 0);
    assert(loaded(0) && loaded(LEAVES - 1) && map.loaded == 4 && map.bytes == 4 * BYTES);
    map_destroy(&map);
}

static void test_what_is_used_stays(void)
{
    set_up(4 * BYTES);
    for (uint64_t i = 0; i < 200; i++) {
        if (!loaded(i % 8 + 1))
            install(i % 8 + 1, 0);
        if (!loaded(0))
            assert(i < 2), install(0, 0);
        assert(map_leaf(&map, 512) == map.leaves[0]);
    }
    map_destroy(&map);
}

static void test_a_limit_below_one_leaf(void)
{
    set_up(1);
    for (uint64_t i = 0; i < 3 * LEAVES; i++) {
        install(i % LEAVES, 0);
        assert(loaded(i % LEAVES) && map.loaded == 1);
    }
    map_destroy(&map);
}

static void test_what_is_loaded_is_newer_than_what_comes(void)
{
    uint64_t entries[LEAF_UNITS] = {0};
    set_up(1 << 20);
    install(3, entry_make(VM_DATA, 1, 4096));
    install(3, entry_make(VM_ZERO, 0, 0));
    assert(entry_kind(map.leaves[3]->entries[0]) == VM_DATA && map.loaded == 1);
    assert(map_install(&map, LEAVES, entries) == -EINVAL);
    map_destroy(&map);
}

int main(void)
{
    test_ranges_against_an_array();
    test_the_limit_is_kept_and_the_pinned_stay();
    test_what_is_used_stays();
    test_a_limit_below_one_leaf();
    test_what_is_loaded_is_newer_than_what_comes();
    return 0;
}
