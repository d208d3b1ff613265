/* The map: which host bytes hold which guest bytes.  No I/O. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define MAX_LEAVES (1ULL << 27)

static uint32_t log2_of(uint64_t power) { return 63 - __builtin_clzll(power); }

int map_create(struct map *map, const struct vm_config *config)
{
    memset(map, 0, sizeof *map);
    map->unit_shift = config->unit_shift;
    map->cluster_shift = config->cluster_shift;
    map->leaf_units = config->leaf_units;
    map->limit = config->map_bytes ? config->map_bytes : 64u << 20;
    if (config->flags & VM_FLAT)
        return 0;
    map->leaf_shift = config->unit_shift + log2_of(config->leaf_units);
    map->leaf_count = (config->size + (1ULL << map->leaf_shift) - 1) >> map->leaf_shift;
    if (map->leaf_count > MAX_LEAVES)
        return -EFBIG;
    map->leaves = calloc(map->leaf_count ? map->leaf_count : 1, sizeof *map->leaves);
    return map->leaves ? 0 : -ENOMEM;
}

void map_destroy(struct map *map)
{
    for (struct leaf *leaf = map->newest, *next; leaf; leaf = next) {
        next = leaf->next;
        free(leaf);
    }
    free(map->leaves);
    map->leaves = NULL;
}

static void unlink_leaf(struct map *map, struct leaf *leaf)
{
    *(leaf->prev ? &leaf->prev->next : &map->newest) = leaf->next;
    *(leaf->next ? &leaf->next->prev : &map->oldest) = leaf->prev;
}

static void push_newest(struct map *map, struct leaf *leaf)
{
    leaf->prev = NULL;
    leaf->next = map->newest;
    *(map->newest ? &map->newest->prev : &map->oldest) = leaf;
    map->newest = leaf;
}

// The second-chance clock: a leaf used since the hand passed gets another round.
static void evict(struct map *map, size_t leaf_bytes)
{
    uint64_t chances = 2 * map->loaded;
    while (map->bytes + leaf_bytes > map->limit && map->oldest && chances--) {
        struct leaf *leaf = map->oldest;
        unlink_leaf(map, leaf);
        if (leaf->referenced || leaf->busy || leaf->dirty) {
            leaf->referenced = false;
            push_newest(map, leaf);
            continue;
        }
        map->leaves[leaf->index] = NULL;
        map->bytes -= leaf_bytes;
        map->loaded--;
        free(leaf);
    }
}

int map_install(struct map *map, uint64_t index, const uint64_t *entries)
{
    size_t bytes = sizeof(struct leaf) + map->leaf_units * sizeof(uint64_t);
    if (index >= map->leaf_count)
        return -EINVAL;
    if (map->leaves[index])
        return 0;  // what is loaded may be newer than what was read
    evict(map, bytes);
    struct leaf *leaf = malloc(bytes);
    if (!leaf)
        return -ENOMEM;
    *leaf = (struct leaf){.index = index, .referenced = true};
    for (uint32_t i = 0; i < map->leaf_units; i++)
        leaf->entries[i] = entries[i] & ~ENTRY_BUSY;
    map->leaves[index] = leaf;
    map->bytes += bytes;
    map->loaded++;
    push_newest(map, leaf);
    return 0;
}

bool map_range_reads_zero(struct map *map, uint64_t offset, uint64_t end)
{
    uint64_t unit = 1ULL << map->unit_shift;
    for (uint64_t at = offset & ~(unit - 1); at < end; at += unit) {
        struct leaf *leaf = map->leaves[at >> map->leaf_shift];
        if (!leaf || !entry_reads_zero(*map_entry(map, leaf, at)))
            return false;
    }
    return true;
}

bool map_range_busy(struct map *map, uint64_t offset, uint64_t end)
{
    uint64_t cluster = 1ULL << map->cluster_shift;
    uint64_t at = offset & ~(cluster - 1);
    while (at < end) {
        struct leaf *leaf = map->leaves[at >> map->leaf_shift];
        if (!leaf || !leaf->busy) {
            at = ((at >> map->leaf_shift) + 1) << map->leaf_shift;
            continue;
        }
        if (*map_entry(map, leaf, at) & ENTRY_BUSY)
            return true;
        at += cluster;
    }
    return false;
}

void map_set_zero(struct map *map, uint64_t offset, uint64_t end)
{
    uint64_t unit = 1ULL << map->unit_shift;
    uint64_t at = offset;
    while (at < end) {
        struct leaf *leaf = map->leaves[at >> map->leaf_shift];
        if (!leaf) {
            at = ((at >> map->leaf_shift) + 1) << map->leaf_shift;
            continue;
        }
        *map_entry(map, leaf, at) = entry_make(VM_ZERO, 0, 0);
        at += unit;
    }
}

void map_publish(struct map *map, uint64_t cluster, uint32_t file, uint64_t host)
{
    uint64_t offset = cluster << map->cluster_shift;
    uint64_t *entry = map_entry(map, map->leaves[offset >> map->leaf_shift], offset);
    uint64_t units = 1ULL << (map->cluster_shift - map->unit_shift);
    for (uint64_t i = 0; i < units; i++)
        entry[i] = entry_make(VM_DATA, file, host + (i << map->unit_shift));
}
