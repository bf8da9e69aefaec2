/* What the engine has to say by itself, until Python takes it.
 *
 * A child and a session's end are never lost: each session brings the room for its own two. What may come as often as a
 * program likes is counted when it repeats. Knows nothing of what a notice means.
 */
#include "internal.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define MAX_TROUBLES 256

static struct {
	pthread_mutex_t lock;
	struct notice *first, *last;
	struct sn_notice troubles[MAX_TROUBLES];
	unsigned int head, count;
	int fd;
} notices = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

int sn_notice_fd(void)
{
	pthread_mutex_lock(&notices.lock);
	if (notices.fd < 0)
		notices.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_unlock(&notices.lock);
	return notices.fd < 0 ? -errno : notices.fd;
}

static void ring(void)
{
	uint64_t one = 1;

	if (notices.fd >= 0 && write(notices.fd, &one, sizeof(one)) < 0)
		return; /* the counter is full: a wake-up is on its way */
}

/* Where a trouble like this one waits, or, when there is no room for another, one of the same kind. */
static struct sn_notice *like(const struct sn_notice *notice)
{
	for (unsigned int i = 0; i < notices.count; i++) {
		struct sn_notice *other = &notices.troubles[(notices.head + i) % MAX_TROUBLES];
		bool same = other->kind == notice->kind && other->session == notice->session &&
			    other->cause == notice->cause;

		if (same && (notice->kind == SN_NOTICE_TROUBLE || notices.count == MAX_TROUBLES))
			return other;
	}
	return notices.count == MAX_TROUBLES ? &notices.troubles[notices.head] : NULL;
}

void notify(const struct sn_notice *notice)
{
	struct sn_notice *other;

	pthread_mutex_lock(&notices.lock);
	other = like(notice);
	if (other) {
		other->count++;
	} else {
		other = &notices.troubles[(notices.head + notices.count++) % MAX_TROUBLES];
		*other = *notice;
		other->count = 1;
	}
	pthread_mutex_unlock(&notices.lock);
	ring();
}

void notice_post(struct notice *notice)
{
	pthread_mutex_lock(&notices.lock);
	notice->what.count = 1;
	notice->waits = true;
	notice->next = NULL;
	if (notices.last)
		notices.last->next = notice;
	else
		notices.first = notice;
	notices.last = notice;
	pthread_mutex_unlock(&notices.lock);
	ring();
}

void notice_forget(struct notice *notice)
{
	struct notice **at, *before = NULL;

	pthread_mutex_lock(&notices.lock);
	for (at = &notices.first; notice->waits && *at; before = *at, at = &(*at)->next) {
		if (*at != notice)
			continue;
		*at = notice->next;
		if (notices.last == notice)
			notices.last = before;
		notice->waits = false;
		break;
	}
	pthread_mutex_unlock(&notices.lock);
}

int sn_next_notice(struct sn_notice *ret)
{
	struct notice *first;
	int found = 1;

	pthread_mutex_lock(&notices.lock);
	first = notices.first;
	if (first) {
		*ret = first->what;
		first->waits = false;
		notices.first = first->next;
		if (!notices.first)
			notices.last = NULL;
	} else if (notices.count) {
		*ret = notices.troubles[notices.head];
		notices.head = (notices.head + 1) % MAX_TROUBLES;
		notices.count--;
	} else {
		found = 0;
	}
	pthread_mutex_unlock(&notices.lock);
	return found;
}
