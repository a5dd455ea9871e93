/* A pretend engine: OpenAI chat completions over HTTP/1.1 keep-alive, one thread, no waiting of its own.
 *
 *     upstream PORT
 *
 * POST .../chat/completions   a JSON answer of 1,024 bytes at once, or, when the body asks for a stream,
 *                             server-sent events at the pace set below: `events` of them, the last one with the
 *                             finish reason, then a usage event where the body asks for `include_usage`, then
 *                             [DONE]. An event is one chunk of the transfer and one write.
 * GET /_pace?first=US&gap=US&events=N   sets the pace of streams that begin from now on
 * GET /_counts                what was answered so far, so that a caller can tell what reached the engine
 * GET anything else           a 200 that satisfies the probes of routers
 *
 * An event is due at a fixed time after its stream began, never after the event before it, so that a late write does
 * not delay the rest. What a reader does not take waits in the connection's own buffer, and its stream with it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MOST_FDS = 8192, ANSWER_BYTES = 1024, BATCH = 128, READ_AT_ONCE = 65536 };

struct bytes {
    char *at;
    size_t used, room;
};

struct peer {
    bool open, streaming, wants_usage, waits_for_room;
    struct bytes in, out;
    long sent, events;        /* of the running stream */
    uint64_t began, first, gap; /* ns */
    int slot;                 /* place in `running` */
};

static struct peer peers[MOST_FDS];
static int running[MOST_FDS], running_count;
static int poller;
static struct {
    uint64_t first, gap;
    long events;
} pace = {20000000, 10000000, 64};
static struct {
    long answers, streams, events, aborted, connections;
} count;
static struct bytes answer, stream_head, event_middle, event_last, event_usage, stream_end;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void append(struct bytes *to, const void *from, size_t n)
{
    if (to->used + n + 1 > to->room) {
        to->room = (to->used + n + 1) * 2;
        to->at = realloc(to->at, to->room);
        if (!to->at)
            abort();
    }
    memcpy(to->at + to->used, from, n);
    to->used += n;
    to->at[to->used] = 0;
}

static void drop(struct bytes *from, size_t n)
{
    memmove(from->at, from->at + n, from->used - n + 1);
    from->used -= n;
}

__attribute__((format(printf, 2, 3))) static void print(struct bytes *to, const char *format, ...)
{
    char line[4096];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    append(to, line, (size_t)n);
}

/* ---- what is said ---- */

static const char IDENTITY[] = "\"id\":\"chatcmpl-loopback\",\"created\":1760000000,\"model\":\"mock-model\"";
static const char USAGE[] = "\"usage\":{\"prompt_tokens\":120,\"completion_tokens\":64,\"total_tokens\":184}";

static void make_event(struct bytes *to, const char *choices, const char *extra)
{
    struct bytes text = {0};
    print(&text, "data: {%s,\"object\":\"chat.completion.chunk\",\"choices\":[%s]%s}\n\n", IDENTITY, choices, extra);
    print(to, "%zx\r\n%s\r\n", text.used, text.at);
    free(text.at);
}

static void make_texts(void)
{
    const char *shape = "{%s,\"object\":\"chat.completion\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
                        "\"content\":\"%s\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],%s}";
    char filler[ANSWER_BYTES + 1] = "", extra[256];
    int frame = snprintf(NULL, 0, shape, IDENTITY, "", USAGE);
    for (int i = 0; i < ANSWER_BYTES - frame; i++)
        filler[i] = "water over the weir "[i % 20];
    print(&answer, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n", ANSWER_BYTES);
    print(&answer, shape, IDENTITY, filler, USAGE);
    print(&stream_head, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                        "cache-control: no-store\r\ntransfer-encoding: chunked\r\n\r\n");
    make_event(&event_middle, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\" water\"},"
                              "\"logprobs\":null,\"finish_reason\":null}", "");
    make_event(&event_last, "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}", "");
    snprintf(extra, sizeof extra, ",%s", USAGE);
    make_event(&event_usage, "", extra);
    print(&stream_end, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
}

/* ---- connections ---- */

static void watch(int fd, bool for_room)
{
    struct epoll_event event = {.events = EPOLLIN | (for_room ? EPOLLOUT : 0u), .data.fd = fd};
    epoll_ctl(poller, EPOLL_CTL_MOD, fd, &event);
    peers[fd].waits_for_room = for_room;
}

static void stop_stream(struct peer *p)
{
    int last = running[--running_count];
    running[p->slot] = last;
    peers[last].slot = p->slot;
    p->streaming = false;
}

static void hang_up(int fd)
{
    struct peer *p = &peers[fd];
    if (p->streaming) {
        stop_stream(p);
        count.aborted++;
    }
    p->open = false;
    p->in.used = p->out.used = 0;
    close(fd);
}

static void flush(int fd)
{
    struct peer *p = &peers[fd];
    while (p->open && p->out.used) {
        ssize_t n = send(fd, p->out.at, p->out.used, MSG_NOSIGNAL);
        if (n > 0)
            drop(&p->out, (size_t)n);
        else if (errno == EAGAIN)
            break;
        else
            hang_up(fd);
    }
    if (p->open && p->waits_for_room != (p->out.used > 0))
        watch(fd, p->out.used > 0);
}

static void say(int fd, const struct bytes *what)
{
    append(&peers[fd].out, what->at, what->used);
    flush(fd);
}

static void say_json(int fd, const char *text)
{
    struct bytes reply = {0};
    print(&reply, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", strlen(text), text);
    say(fd, &reply);
    free(reply.at);
}

/* ---- streams ---- */

static uint64_t due(const struct peer *p)
{
    return p->began + p->first + (uint64_t)p->sent * p->gap;
}

static void begin_stream(int fd, bool wants_usage)
{
    struct peer *p = &peers[fd];
    count.streams++;
    p->streaming = true;
    p->wants_usage = wants_usage;
    p->sent = 0;
    p->events = pace.events;
    p->first = pace.first;
    p->gap = pace.gap;
    p->began = now();
    p->slot = running_count;
    running[running_count++] = fd;
    say(fd, &stream_head);
}

static void next_event(int fd)
{
    struct peer *p = &peers[fd];
    count.events++;
    if (++p->sent < p->events) {
        say(fd, &event_middle);
        return;
    }
    append(&p->out, event_last.at, event_last.used);
    if (p->wants_usage)
        append(&p->out, event_usage.at, event_usage.used);
    stop_stream(p);
    say(fd, &stream_end);
}

/* ---- requests ---- */

static bool says_true(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    if (!at)
        return false;
    at += strlen(name);
    at += strspn(at, "\" :\t\n");
    return !strncmp(at, "true", 4);
}

static long number_of(const char *query, const char *name, long otherwise)
{
    const char *at = strstr(query, name);
    return at ? atol(at + strlen(name)) : otherwise;
}

static void inspect(int fd, const char *path)
{
    char text[512];
    if (!strncmp(path, "/_pace", 6)) {
        pace.first = (uint64_t)number_of(path, "first=", 0) * 1000;
        pace.gap = (uint64_t)number_of(path, "gap=", 0) * 1000;
        pace.events = number_of(path, "events=", 64);
        say_json(fd, "{}");
    } else if (!strncmp(path, "/_counts", 8)) {
        snprintf(text, sizeof text,
                 "{\"answers\":%ld,\"streams\":%ld,\"events\":%ld,\"aborted\":%ld,\"connections\":%ld,\"running\":%d}",
                 count.answers, count.streams, count.events, count.aborted, count.connections, running_count);
        say_json(fd, text);
    } else if (!strncmp(path, "/v1/models", 10)) {
        say_json(fd, "{\"object\":\"list\",\"data\":[{\"id\":\"mock-model\",\"object\":\"model\",\"created\":1760000000,"
                     "\"owned_by\":\"loopback\",\"max_model_len\":32768}]}");
    } else {
        say_json(fd, "{\"status\":\"ok\",\"version\":\"0.5.0\",\"model_id\":\"mock-model\",\"model_path\":\"mock-model\","
                     "\"served_model_name\":\"mock-model\",\"is_generation\":true,\"tp_size\":1,\"dp_size\":1}");
    }
}

/* The length of a chunked body that begins at `at`, or 0 while it is not all there. */
static size_t chunked_length(const char *at, size_t have)
{
    size_t used = 0;
    for (;;) {
        const char *line_end = memmem(at + used, have - used, "\r\n", 2);
        if (!line_end)
            return 0;
        size_t size = strtoul(at + used, NULL, 16);
        used = (size_t)(line_end - at) + 2 + size + 2;
        if (used > have)
            return 0;
        if (size == 0)
            return used;
    }
}

/* Answers one request if a whole one is there; false if not. */
static bool take_request(int fd)
{
    struct peer *p = &peers[fd];
    char *body = p->in.used ? memmem(p->in.at, p->in.used, "\r\n\r\n", 4) : NULL;
    if (!body)
        return false;
    *body = 0; /* the head is a string now; put back below if the body is not all there */
    const char *length = strcasestr(p->in.at, "\ncontent-length:");
    bool chunked = strcasestr(p->in.at, "\ntransfer-encoding: chunked") != NULL;
    size_t head = (size_t)(body - p->in.at) + 4, have = p->in.used - head;
    size_t size = length ? strtoul(length + 16, NULL, 10) : 0;
    if (chunked)
        size = chunked_length(body + 4, have);
    if (have < size || (chunked && !size)) {
        *body = '\r';
        return false;
    }
    char *path = strchr(p->in.at, ' ');
    char after = body[4 + size];
    body[4 + size] = 0;
    if (!strncmp(p->in.at, "GET ", 4)) {
        inspect(fd, path + 1);
    } else if (!strstr(p->in.at, "/chat/completions")) {
        say_json(fd, "{}");
    } else if (says_true(body + 4, "\"stream\"")) {
        begin_stream(fd, says_true(body + 4, "\"include_usage\""));
    } else {
        count.answers++;
        say(fd, &answer);
    }
    if (!p->open)
        return false;
    body[4 + size] = after;
    drop(&p->in, head + size);
    return true;
}

static void listen_to(int fd)
{
    struct peer *p = &peers[fd];
    char part[READ_AT_ONCE];
    ssize_t n = recv(fd, part, sizeof part, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN)) {
        hang_up(fd);
        return;
    }
    if (n > 0)
        append(&p->in, part, (size_t)n);
    while (p->open && !p->streaming && take_request(fd))
        ;
}

static void welcome(int listener)
{
    int one = 1, fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MOST_FDS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
        peers[fd].open = true;
        peers[fd].streaming = peers[fd].waits_for_room = false;
        peers[fd].in.used = peers[fd].out.used = 0;
        count.connections++;
    }
}

/* Sends each stream the event that is due, one a turn; returns when the next one is due, or UINT64_MAX. */
static uint64_t advance(void)
{
    uint64_t soonest = UINT64_MAX, t = now();
    for (int i = running_count - 1; i >= 0; i--) {
        int fd = running[i];
        struct peer *p = &peers[fd];
        if (p->out.used)
            continue;
        if (due(p) <= t)
            next_event(fd);
        if (p->streaming && !p->out.used && due(p) < soonest)
            soonest = due(p);
        if (!p->streaming && p->open)
            while (p->open && !p->streaming && take_request(fd))
                ;
    }
    return soonest;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: upstream PORT\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    make_texts();
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])),
                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 1024)) {
        perror("upstream");
        return 1;
    }
    poller = epoll_create1(0);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    event.data.fd = timer;
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event);
    for (;;) {
        struct epoll_event ready[BATCH];
        uint64_t soonest = advance();
        bool at_once = soonest <= now();
        if (!at_once && soonest != UINT64_MAX) {
            struct itimerspec when = {.it_value = {(time_t)(soonest / 1000000000u), (long)(soonest % 1000000000u)}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
        }
        int n = epoll_wait(poller, ready, BATCH, at_once ? 0 : -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) {
                welcome(listener);
            } else if (fd == timer) {
                uint64_t ticks;
                if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN)
                    return 1;
            } else if (peers[fd].open) {
                if (ready[i].events & EPOLLOUT)
                    flush(fd);
                if (peers[fd].open && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                    listen_to(fd);
            }
        }
    }
}
