/* Table entries to map entries.  Pure: no state, no I/O.  The Python twin is image.decode(). */
#include <string.h>

#include "internal.h"

static uint64_t load(const struct vm_layout *layout, const uint8_t *raw)
{
    if (layout->width == 4) {
        uint32_t entry;
        memcpy(&entry, raw, 4);
        return layout->big_endian ? __builtin_bswap32(entry) : entry;
    }
    uint64_t entry;
    memcpy(&entry, raw, 8);
    return layout->big_endian ? __builtin_bswap64(entry) : entry;
}

static bool touches(const struct vm_range *ranges, uint64_t count, uint64_t host, uint64_t length)
{
    uint64_t low = 0, high = count;  // the first range that ends past host
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (ranges[middle].offset + ranges[middle].length <= host)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && ranges[low].offset < host + length;
}

int vm_decode(const struct vm_layout *layout, const void *raw, uint64_t raw_count, uint32_t source,
              uint32_t layer, uint64_t unit, uint64_t repeat, uint64_t skip, uint64_t limit,
              const struct vm_range *forbidden, uint64_t forbidden_count, uint64_t *ret,
              uint64_t unit_count)
{
    uint64_t partial = 0;
    for (uint64_t i = 0; i < raw_count; i++) {
        uint64_t first = i * repeat < skip ? 0 : i * repeat - skip;
        uint64_t within = i * repeat + repeat <= skip ? repeat : first + skip - i * repeat;
        if (first >= unit_count)
            break;
        uint64_t entry = load(layout, (const uint8_t *)raw + i * layout->width);
        uint32_t kind = VM_DATA;
        for (uint32_t r = 0; r < layout->rule_count; r++) {
            if ((entry & layout->rules[r].mask) == layout->rules[r].value) {
                kind = layout->rules[r].kind;
                break;
            }
        }
        if (kind == VM_ABSENT)
            continue;
        uint64_t host = 0;
        if (kind == VM_DATA || kind == VM_SHARED) {
            bool wrong = __builtin_mul_overflow(entry & layout->mask, layout->scale, &host)
                         || __builtin_add_overflow(host, layout->bias, &host);
            if (wrong || host < layout->low || host & (layout->align - 1) || host >= limit
                || host >= 1ULL << 59
                || touches(forbidden, forbidden_count, host, repeat * unit))
                kind = VM_INVALID;
        }
        for (uint64_t j = within; j < repeat && first < unit_count; j++, first++) {
            if (entry_kind(ret[first]) != VM_ABSENT)
                continue;
            if (kind == VM_DATA || kind == VM_SHARED)
                ret[first] = entry_make(kind, source, host + j * unit);
            else
                ret[first] = entry_make(kind, kind == VM_COMPRESSED ? layer : 0, 0);
            partial += kind == VM_PARTIAL;
        }
    }
    return partial > 0x7fffffff ? 0x7fffffff : (int)partial;
}
