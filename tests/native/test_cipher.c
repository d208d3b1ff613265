/* Encrypted files: every write a copy that is freed, every read decrypted in place, on all ends. */
#include "harness.h"

enum { DISK = 4 * MIB, CLUSTER = 64 * KIB, UNIT = CLUSTER, LEAF = 64 };

static uint8_t buffer[DISK], wanted[DISK];

static struct vm_cipher xts(void)
{
    struct vm_cipher cipher = {.mode = VM_CIPHER_XTS, .key_length = 64};
    for (int i = 0; i < 64; i++)
        cipher.key[i] = i;
    return cipher;
}

static void set_up(int fd, uint32_t flags)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .cluster_shift = 16,
                               .unit_shift = 16, .leaf_units = LEAF, .flags = flags};
    struct vm_cipher cipher = xts();
    create(&config);
    add_file(fd, true);
    assert(vm_engine_set_cipher(engine, 1, &cipher) == -EINVAL);  // no such file
    assert(vm_engine_set_cipher(engine, 0, &cipher) == 0);
    assert(vm_engine_set_cipher(engine, 0, &cipher) == -EINVAL);  // it has one
    start_loop();
}

static void refill(uint64_t host)
{
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    assert(vm_pool_add(engine, 0, host, DISK / CLUSTER, 0) == 0);
    vm_answer(engine, fault.id, 0);
}

static void write_parts(void)
{
    memset(wanted, 0, sizeof wanted);
    for (uint64_t at = 512; at < DISK; at += 5 * CLUSTER / 2) {
        uint64_t length = at / 512 % 3 ? 512 : CLUSTER + 1024;
        if (length > DISK - at)
            length = DISK - at;
        memset(wanted + at, 1 + at / CLUSTER, length);
        assert(vm_io(engine, VM_OP_WRITE, at, length, wanted + at, 0) == 0);
    }
}

static void test_what_was_written_reads_back_and_the_rest_as_zeros(void)
{
    set_up(temporary(), 0);
    struct job *job = issue(VM_OP_WRITE, 0, 512, wanted, 0);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF, UNIT, VM_ABSENT, 0);
    refill(MIB);
    assert(result_of(job) == 0);
    write_parts();
    assert(vm_io(engine, VM_OP_READ, 0, DISK, buffer, 0) == 0);
    assert(!memcmp(buffer, wanted, DISK));
    assert(pread(files[0], buffer, CLUSTER, MIB) == CLUSTER);
    assert(!all_bytes(buffer, 512, 0) && memcmp(buffer, buffer + 512, 512));
    finish_all();
}

static void test_flat(void)
{
    set_up(temporary(), VM_FLAT);
    assert(ftruncate(files[0], DISK) == 0);
    struct job *job = issue(VM_OP_WRITE, 512, 1024, memset(wanted, 'x', 2048), 0);
    begin();
    assert(result_of(job) == 0);
    assert(vm_io(engine, VM_OP_READ, 512, 1024, buffer, 0) == 0);
    assert(all_bytes(buffer, 1024, 'x'));
    assert(pread(files[0], buffer, 1024, 512) == 1024);
    assert(!all_bytes(buffer, 512, 'x') && memcmp(buffer, buffer + 512, 512));
    finish_all();
}

static void test_a_failed_write_frees_its_copy(void)
{
    set_up(open("/dev/full", O_RDWR | O_CLOEXEC), VM_FLAT);
    struct job *job = issue(VM_OP_WRITE, 0, CLUSTER, wanted, 0);
    begin();
    assert(result_of(job) == -ENOSPC);
    assert(expect(VM_FAULT_FAILED).arg == ENOSPC);
    finish_all();
}

int main(void)
{
    test_what_was_written_reads_back_and_the_rest_as_zeros();
    test_flat();
    test_a_failed_write_frees_its_copy();
    return 0;
}
