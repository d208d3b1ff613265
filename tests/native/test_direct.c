/* Which descriptor a piece goes to.  Here the two are different files, so that the bytes tell. */
#include "harness.h"

enum { ALIGN = 4096, DISK = 64 * KIB };

static _Alignas(ALIGN) uint8_t buffer[DISK + ALIGN];

static int filled(uint8_t value, size_t length)
{
    static uint8_t data[DISK + ALIGN];
    int fd = temporary();
    memset(data, value, sizeof data);
    assert(pwrite(fd, data, length, 0) == (ssize_t)length);
    return fd;
}

static void set_up(int fd, int direct_fd, uint64_t flat_offset)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .cluster_shift = 16,
                               .flat_offset = flat_offset, .flags = VM_FLAT};
    create(&config);
    files[file_count++] = fd;
    files[file_count++] = direct_fd;
    assert(vm_engine_add_file(engine, fd, direct_fd, ALIGN, true) == 0);
    start_loop();
}

static void begun(void)
{
    struct job *job = issue(VM_OP_WRITE, 0, 0, NULL, 0);
    assert(result_of(job) == 0);  // nothing to write, nothing to begin
    job = issue(VM_OP_WRITE, 32 * KIB, ALIGN, buffer, 0);
    begin();
    assert(result_of(job) == 0);
}

static bool reads(uint64_t offset, uint64_t length, uint64_t shift, uint8_t value)
{
    memset(buffer, 0, sizeof buffer);
    assert(vm_io(engine, VM_OP_READ, offset, length, buffer + shift, 0) == 0);
    return all_bytes(buffer + shift, length, value);
}

static void test_only_what_is_aligned_in_every_respect_is_direct(void)
{
    set_up(filled('b', DISK), filled('d', DISK), 0);
    assert(reads(0, ALIGN, 0, 'd') && reads(ALIGN, 4 * ALIGN, 0, 'd') && reads(0, DISK, 0, 'd'));
    assert(reads(512, ALIGN, 0, 'b'));        // on the host
    assert(reads(ALIGN, ALIGN - 512, 0, 'b'));  // in length
    assert(reads(ALIGN, ALIGN, 512, 'b'));    // in memory
    finish_all();
    set_up(filled('b', DISK + 512), filled('d', DISK + 512), 512);
    assert(reads(0, ALIGN, 0, 'b') && reads(ALIGN - 512, ALIGN, 0, 'd'));
    finish_all();
}

static void test_writes_likewise(void)
{
    uint8_t byte;
    set_up(filled('b', DISK), filled('d', DISK), 0);
    begun();
    memset(buffer, 'w', sizeof buffer);
    assert(vm_io(engine, VM_OP_WRITE, 0, ALIGN, buffer, 0) == 0);
    assert(vm_io(engine, VM_OP_WRITE, ALIGN, 512, buffer, 0) == 0);
    assert(vm_io(engine, VM_OP_WRITE, 2 * ALIGN, ALIGN, buffer + 512, 0) == 0);
    assert(pread(files[1], &byte, 1, 0) == 1 && byte == 'w');
    assert(pread(files[0], &byte, 1, 0) == 1 && byte == 'b');
    assert(pread(files[0], &byte, 1, ALIGN) == 1 && byte == 'w');
    assert(pread(files[0], &byte, 1, 2 * ALIGN) == 1 && byte == 'w');
    assert(vm_io(engine, VM_OP_WRITE_ZEROES, 0, ALIGN, NULL, 0) == 0);
    assert(pread(files[1], &byte, 1, 0) == 1 && byte == 0);
    finish_all();
}

/* The end of a file that is not a multiple of anything: the rest is read buffered, then zeros. */
static void test_a_short_end_is_read_on(void)
{
    set_up(filled('b', 3 * ALIGN + 1000), filled('d', 2 * ALIGN + 700), 0);
    memset(buffer, 1, sizeof buffer);
    assert(vm_io(engine, VM_OP_READ, ALIGN, 4 * ALIGN, buffer, 0) == 0);
    assert(all_bytes(buffer, ALIGN + 700, 'd'));
    assert(all_bytes(buffer + ALIGN + 700, ALIGN - 700 + 1000, 'b'));
    assert(all_bytes(buffer + 2 * ALIGN + 1000, 2 * ALIGN - 1000, 0));
    finish_all();
}

/* EINVAL is what O_DIRECT says where memory is not to its liking, or a device has larger sectors than
 * it seemed.  Here: a namespace, which cannot be read, and a file that understands digits only. */
static void test_what_direct_io_refuses_is_done_buffered(void)
{
    set_up(filled('b', DISK), open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC), 0);
    assert(reads(0, DISK, 0, 'b'));
    finish_all();
    set_up(filled('b', DISK), open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC), 0);
    begun();
    memset(buffer, 'w', sizeof buffer);
    assert(vm_io(engine, VM_OP_WRITE, 0, DISK, buffer, 0) == 0);
    expect_none();  // it was no failure
    memset(buffer, 0, sizeof buffer);
    assert(pread(files[0], buffer, DISK, 0) == DISK && all_bytes(buffer, DISK, 'w'));
    finish_all();
    set_up(open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC),
           open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC), 0);
    assert(vm_io(engine, VM_OP_READ, 0, DISK, buffer, 0) == -EINVAL);
    assert(vm_io(engine, VM_OP_READ, 512, 512, buffer, 0) == -EINVAL);
    finish_all();
}

int main(void)
{
    test_only_what_is_aligned_in_every_respect_is_direct();
    test_writes_likewise();
    test_a_short_end_is_read_on();
    test_what_direct_io_refuses_is_done_buffered();
    return 0;
}
