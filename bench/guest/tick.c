/*
 * The guest's work: a counter in a page whose physical address is printed, and a steady number
 * of pages that are written anew every 20 ms.
 *
 * It is process 1 of an initramfs. Arguments are the kernel's command line; of interest are
 *   workload_pages=N   pages to write every 20 ms (default 900)
 *   say_every=N        broadcast the counter on eth0, by UDP, every N counts (default 0: never)
 *   job=cpu|memory     works without a break beside that, and counts what it has done in the 64-bit
 *                      number behind the counter: `cpu` only computes, `memory` writes at random in
 *                      64 MiB
 * and what arrives on the console: `r` reboots, `p` powers off, `c` panics.
 *
 * Output on the console:
 *   TICKPAGE gpa=0x...    where the counter lives: a 64-bit number, at the start of the page
 *   tick N                once a second
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
/* At least so many, and twice what one round writes, so that each round writes other ones. */
#define POOL_PAGES_MIN 8192
#define WORKLOAD_PAGES_MAX 16384
#define ROUND_NS 20000000L
#define TICK_NS 1000000L
#define JOB_PAGES 16384
/* Of one piece of work. */
#define JOB_STEPS 20000
#define JOB_WRITES 200

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static unsigned char *pages(size_t count)
{
    unsigned char *memory = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE,
                                 MAP_SHARED | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return memory;
}

/* Reads the page's frame number from the page table, as only root may. */
static uint64_t physical_address(const void *page)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    off_t at = (off_t)((uintptr_t)page / PAGE * sizeof(entry));
    if (fd < 0 || pread(fd, &entry, sizeof(entry), at) != sizeof(entry)) {
        perror("pagemap");
        exit(1);
    }
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

static struct sockaddr_in address(const char *host, int port)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &in.sin_addr);
    return in;
}

/* Brings eth0 up, in 10.0.0.0/8, and returns a socket whose packets are broadcast there. */
static int broadcaster(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0), yes = 1;
    struct ifreq eth = {.ifr_name = "eth0"};
    struct sockaddr_in own = address("10.0.2.15", 0), all = address("10.255.255.255", 9);
    memcpy(&eth.ifr_addr, &own, sizeof(own));
    int failed = fd < 0 || ioctl(fd, SIOCSIFADDR, &eth);
    eth.ifr_flags = IFF_UP | IFF_BROADCAST;
    failed = failed || ioctl(fd, SIOCSIFFLAGS, &eth);
    failed = failed || setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &yes, sizeof(yes));
    failed = failed || connect(fd, (struct sockaddr *)&all, sizeof(all));
    if (failed) {
        perror("eth0");
        exit(1);
    }
    return fd;
}

static void say(int fd, uint64_t tick)
{
    char packet[12] = "TICK";
    memcpy(packet + 4, &tick, sizeof(tick));
    /* A full queue loses it, as a network does. */
    if (send(fd, packet, sizeof(packet), MSG_DONTWAIT) < 0)
        return;
}

/* Works until the machine ends. */
static void job(const char *kind, volatile uint64_t *done)
{
    uint64_t *memory = strcmp(kind, "memory") ? NULL : (uint64_t *)pages(JOB_PAGES);
    uint64_t x = 88172645463325252u;
    for (;;) {
        for (int step = 0; step < JOB_STEPS; step++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            if (memory && step % (JOB_STEPS / JOB_WRITES) == 0)
                memory[x % (JOB_PAGES * PAGE / sizeof(x))] = x;
        }
        /* The result is used, or the compiler would leave the work out. */
        *done += 1 + (x == 0);
    }
}

static void command(char letter)
{
    if (letter == 'r')
        reboot(RB_AUTOBOOT);
    else if (letter == 'p')
        reboot(RB_POWER_OFF);
    else if (letter == 'c')
        abort(); /* the kernel panics when process 1 ends */
}

int main(int argc, char **argv)
{
    unsigned long workload = 900, say_every = 0;
    const char *work = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "workload_pages=", 15))
            workload = strtoul(argv[i] + 15, NULL, 10);
        if (!strncmp(argv[i], "say_every=", 10))
            say_every = strtoul(argv[i] + 10, NULL, 10);
        if (!strncmp(argv[i], "job=", 4))
            work = argv[i] + 4;
    }
    if (workload > WORKLOAD_PAGES_MAX)
        workload = WORKLOAD_PAGES_MAX;
    size_t pool_pages = 2 * workload > POOL_PAGES_MIN ? 2 * workload : POOL_PAGES_MIN;

    int console = open("/dev/console", O_RDWR | O_NONBLOCK);
    if (console >= 0) {
        dup2(console, 0);
        dup2(console, 1);
        dup2(console, 2);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);

    volatile uint64_t *tick = (volatile uint64_t *)pages(1);
    unsigned char *pool = pages(pool_pages);
    int network = say_every ? broadcaster() : -1;
    *tick = 1;
    if (work && fork() == 0)
        job(work, tick + 1);
    printf("TICKPAGE gpa=0x%llx\n", (unsigned long long)physical_address((void *)tick));

    uint64_t next_tick = now_ns(), next_round = next_tick, said = next_tick;
    size_t at = 0;
    for (;;) {
        struct timespec nap = {0, TICK_NS};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, NULL);
        uint64_t now = now_ns();
        while (next_tick <= now) {
            next_tick += TICK_NS;
            ++*tick;
            if (say_every && *tick % say_every == 0)
                say(network, *tick);
        }
        if (now >= next_round) {
            next_round += ROUND_NS;
            if (next_round < now)
                next_round = now; /* paused for long: no catching up */
            for (unsigned long i = 0; i < workload; i++, at = (at + 1) % pool_pages)
                *(volatile uint64_t *)(pool + at * PAGE + 64 * (at % 60)) = now ^ *tick;
        }
        if (now - said >= 1000000000u) {
            said = now;
            printf("tick %llu\n", (unsigned long long)*tick);
            char letter;
            while (read(0, &letter, 1) == 1)
                command(letter);
        }
    }
}
