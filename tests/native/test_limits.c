/* What the engine refuses: configurations that it could not serve, and requests that are not inside
 * the disk.  The numbers come from images, so the worst ones are tried. */
#include "harness.h"

static const struct vm_config good = {.size = 8 * MIB, .sector_size = 512, .unit_shift = 12,
                                      .cluster_shift = 16, .leaf_units = 256};

static int created(struct vm_config config)
{
    struct vm_engine *made = NULL;
    int error = vm_engine_create(&config, &made);
    assert((error == 0) == (made != NULL));
    if (made)
        vm_engine_destroy(made);
    return error;
}

#define WITH(...) ({ struct vm_config config = good; __VA_ARGS__; created(config); })

static void test_configurations(void)
{
    assert(created(good) == 0);
    assert(WITH(config.size = 0) == 0);
    assert(WITH(config.size = 1000) == -EINVAL);
    assert(WITH(config.size = UINT64_MAX & -512) == -EINVAL);
    assert(WITH(config.size = 1ull << 63) == -EINVAL);
    assert(WITH(config.size = 1ull << 62) == -EFBIG);  // more leaves than anybody needs
    assert(WITH(config.cluster_shift = 8) == -EINVAL);
    assert(WITH(config.cluster_shift = 41) == -EINVAL);
    assert(WITH(config.cluster_shift = UINT32_MAX) == -EINVAL);
    assert(WITH(config.unit_shift = 8) == -EINVAL);
    assert(WITH(config.unit_shift = 17) == -EINVAL);
    assert(WITH(config.unit_shift = 64) == -EINVAL);
    assert(WITH(config.unit_shift = UINT32_MAX) == -EINVAL);
    assert(WITH(config.leaf_units = 0) == -EINVAL);
    assert(WITH(config.leaf_units = 255) == -EINVAL);
    assert(WITH(config.leaf_units = 128) == -EINVAL);                             // below 1 MiB
    assert(WITH(config.cluster_shift = 21) == -EINVAL);                           // below a cluster
    assert(WITH(config.leaf_units = 1u << 31) == -EINVAL);                        // 16 GiB of map
    assert(WITH(config.unit_shift = config.cluster_shift = 40, config.leaf_units = 1u << 24)
           == -EINVAL);  // 2^64 bytes
    assert(WITH(config.flags = VM_FLAT, config.flat_offset = 1 << 20) == 0);
    assert(WITH(config.flags = VM_FLAT, config.flat_offset = UINT64_MAX - 511) == -EINVAL);
    assert(WITH(config.flags = VM_FLAT, config.flat_offset = INT64_MAX - 511) == -EINVAL);
}

static void test_files(void)
{
    create(&good);
    int fd = temporary();
    assert(vm_engine_add_file(engine, fd, fd, 0, 0) == -EINVAL);
    assert(vm_engine_add_file(engine, fd, fd, 256, 0) == -EINVAL);
    assert(vm_engine_add_file(engine, fd, fd, 1000, 0) == -EINVAL);
    for (int i = 0; i < 256; i++)
        assert(vm_engine_add_file(engine, fd, fd, 512, i % 2) == i);
    assert(vm_engine_add_file(engine, fd, -1, 0, 0) == -EMFILE);
    destroy();
    close(fd);
}

static void test_requests(uint32_t flags)
{
    static uint8_t data[4096];
    struct vm_config config = good;
    config.flags = flags;
    create(&config);
    add_file(temporary(), true);
    start_loop();
    static const uint32_t ops[] = {VM_OP_READ, VM_OP_WRITE, VM_OP_DISCARD, VM_OP_WRITE_ZEROES};
    for (int i = 0; i < 4; i++) {
        uint32_t op = ops[i];
        assert(vm_io(engine, op, 1, 512, data, 0) == -EINVAL);
        assert(vm_io(engine, op, 0, 511, data, 0) == -EINVAL);
        assert(vm_io(engine, op, good.size, 512, data, 0) == -EINVAL);
        assert(vm_io(engine, op, good.size - 512, 1024, data, 0) == -EINVAL);
        assert(vm_io(engine, op, UINT64_MAX - 511, 512, data, 0) == -EINVAL);
        assert(vm_io(engine, op, UINT64_MAX - 511, 1024, data, 0) == -EINVAL);
        assert(vm_io(engine, op, 512, UINT64_MAX - 511, data, 0) == -EINVAL);
        assert(vm_io(engine, op, good.size, 0, data, 0)
               == (op == VM_OP_READ || !(flags & VM_READ_ONLY) ? 0 : -EROFS));
    }
    assert(vm_io(engine, 4, 0, 512, data, 0) == -EOPNOTSUPP);
    assert(vm_io(engine, 6, 0, 512, data, 0) == -EOPNOTSUPP);
    assert(vm_io(engine, 255, 0, 512, data, 0) == -EOPNOTSUPP);
    if (flags & VM_READ_ONLY) {
        for (int i = 1; i < 4; i++)
            assert(vm_io(engine, ops[i], 0, 512, data, 0) == -EROFS);
        assert(vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0) == 0);
    }
    expect_none();
    assert(stats().in_flight == 0 && stats().host_writes == 0);
    finish_all();
}

int main(void)
{
    test_configurations();
    test_files();
    test_requests(0);
    test_requests(VM_READ_ONLY);
    return 0;
}
