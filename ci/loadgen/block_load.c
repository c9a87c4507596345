/*
 * What a disk image gives without a VM: the jobs of guest-rt/benchguest, done by the host.
 *
 * Keeps a fixed number of O_DIRECT reads or writes in flight by io_uring, and prints for each job how many were done
 * and how long they took, in the form of the guest:
 *
 *   block_load FILE JOB...
 *
 * JOB            KIND:BYTES:DEPTH:OPERATIONS:MS, KIND one of randread, randwrite, seqread, seqwrite
 * prints         result JOB OPERATIONS NANOSECONDS
 *
 * Bounds: DEPTH at most MAX_DEPTH, BYTES at most MAX_BYTES; a job ends after OPERATIONS or MS, whichever is first, and the
 * run at the first error. The places of random operations are those of the guest.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 128
#define MAX_BYTES (4u << 20)
#define ALIGN 4096
/* Small, so that the device works on the first while the others are being made: measured to be best. */
#define SUBMIT_BATCH 2
#define HUGE_PAGE (2ul << 20)

struct job {
    int random, write;
    uint64_t bytes, depth, operations, ms;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void fail(const char *what, int error)
{
    fprintf(stderr, "block_load: %s: %s\n", what, strerror(error));
    exit(1);
}

static struct job parse(const char *text)
{
    struct job job;
    char kind[16];
    if (sscanf(text, "%15[^:]:%lu:%lu:%lu:%lu", kind, &job.bytes, &job.depth, &job.operations, &job.ms) != 5)
        fail(text, EINVAL);
    job.random = !strncmp(kind, "rand", 4);
    job.write = !strcmp(kind + (job.random ? 4 : 3), "write");
    if (job.bytes == 0 || job.bytes > MAX_BYTES || job.bytes % ALIGN || job.depth == 0 || job.depth > MAX_DEPTH ||
        job.operations == 0)
        fail(text, EINVAL);
    return job;
}

static void run(int fd, uint64_t size, const char *text)
{
    struct job job = parse(text);
    struct io_uring ring;
    unsigned flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    int error = io_uring_queue_init(MAX_DEPTH, &ring, flags);
    if (error == -EINVAL)
        error = io_uring_queue_init(MAX_DEPTH, &ring, 0);
    if (error < 0)
        fail("io_uring", -error);
    /* Large pages, as guest memory has: a device takes them in fewer pieces. */
    uint64_t length = (job.depth * job.bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char *buffers = aligned_alloc(HUGE_PAGE, length);
    if (!buffers)
        fail("memory", ENOMEM);
    madvise(buffers, length, MADV_HUGEPAGE);
    memset(buffers, 0x5a, length);
    uint64_t places = size / job.bytes, random = 0x9e3779b97f4a7c15u;
    uint64_t started = 0, done = 0, ready = job.depth;
    uintptr_t free_slots[MAX_DEPTH];
    for (uint64_t i = 0; i < job.depth; i++)
        free_slots[i] = i;
    if (places == 0)
        fail("the file is too small", EINVAL);
    uint64_t start = now_ns(), end = start + job.ms * 1000000u;
    for (;;) {
        while (ready > 0 && started < job.operations && now_ns() < end) {
            uint64_t place = started % places;
            if (job.random) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                place = random % places;
            }
            struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
            if (!sqe)
                fail("no room in the ring", EBUSY);
            uintptr_t slot = free_slots[--ready];
            if (job.write)
                io_uring_prep_write(sqe, fd, buffers + slot * job.bytes, (unsigned)job.bytes, place * job.bytes);
            else
                io_uring_prep_read(sqe, fd, buffers + slot * job.bytes, (unsigned)job.bytes, place * job.bytes);
            io_uring_sqe_set_data(sqe, (void *)slot);
            started++;
            if (started % SUBMIT_BATCH == 0 && (error = io_uring_submit(&ring)) < 0)
                fail("io_uring", -error);
        }
        if (done == started)
            break;
        error = io_uring_submit_and_wait(&ring, 1);
        if (error < 0 && error != -EINTR)
            fail("io_uring", -error);
        struct io_uring_cqe *cqe;
        while (io_uring_peek_cqe(&ring, &cqe) == 0) {
            if (cqe->res != (int)job.bytes)
                fail(text, cqe->res < 0 ? -cqe->res : EIO);
            free_slots[ready++] = (uintptr_t)io_uring_cqe_get_data(cqe);
            io_uring_cqe_seen(&ring, cqe);
            done++;
        }
    }
    printf("result %s %lu %lu\n", text, done, now_ns() - start);
    io_uring_queue_exit(&ring);
    free(buffers);
}

int main(int argc, char **argv)
{
    struct stat stat;
    if (argc < 3) {
        fprintf(stderr, "usage: block_load FILE JOB...\n");
        return 2;
    }
    int fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &stat) < 0)
        fail(argv[1], errno);
    for (int i = 2; i < argc; i++)
        run(fd, (uint64_t)stat.st_size, argv[i]);
    return 0;
}
