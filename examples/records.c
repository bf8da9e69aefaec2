/* A C program that lets snapd manage its heap: it keeps 64 MiB of records and answers for each line "N" on its standard
 * input with record N.
 *
 * After `make install` (below /usr, or with /usr/local/lib among the loader's directories):
 *
 *     cc -O2 -o records records.c -lsnapd-agent
 *     snapd daemon &
 *     ./records
 *
 * With snapd from pip, the header and the library are in the package:
 *
 *     dir=$(python3 -c 'from snapd.agent import header_path; print(header_path())')
 *     cc -O2 -I"$dir" -o records records.c "$dir/libsnapd-agent.so"
 *
 * Then, elsewhere, `snapd dump PID` takes the records out of memory and `snapd status` shows it; each comes back when
 * somebody asks for it. Without a daemon the program runs as any other, and joins when a daemon comes up.
 */
#include <snapd.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RECORDS 1000000L

struct record {
	long number;
	char name[56];
};

/* Where a daemon listens for agents: as `snapd` itself finds its runtime directory. */
static void agent_socket(char *path, size_t size)
{
	const char *given = getenv("SNAPD_RUNTIME_DIR"), *base = getenv("XDG_RUNTIME_DIR");

	if (given && *given)
		snprintf(path, size, "%s/agent.sock", given);
	else if (geteuid() == 0 || !base)
		snprintf(path, size, "/run/heap-snapd/agent.sock");
	else
		snprintf(path, size, "%s/heap-snapd/agent.sock", base);
}

static void write_record(struct record *record, long number)
{
	memset(record, 0, sizeof(*record));
	record->number = number;
	snprintf(record->name, sizeof(record->name), "record %ld, squared %ld", number, number * number);
}

/* Looks at every record, and so brings all of them back. */
static long count_wrong(const struct record *records)
{
	struct record right;
	long wrong = 0;

	for (long i = 0; i < RECORDS; i++) {
		write_record(&right, i);
		wrong += memcmp(&records[i], &right, sizeof(right)) != 0;
	}
	return wrong;
}

int main(void)
{
	struct record *records = malloc(RECORDS * sizeof(*records));
	char path[108], line[64];
	int error;
	long wrong;

	if (!records) {
		perror("records");
		return 1;
	}
	for (long i = 0; i < RECORDS; i++)
		write_record(&records[i], i);

	agent_socket(path, sizeof(path));
	error = snapd_cooperate(path);
	if (error)
		fprintf(stderr, "records: not managed by snapd: %s\n", strerror(-error));

	printf("pid %d has %ld records\n", (int)getpid(), RECORDS);
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		long number = strtol(line, NULL, 10);

		if (number < 0 || number >= RECORDS)
			printf("there is no record %ld\n", number);
		else
			printf("%s\n", records[number].name);
		fflush(stdout);
	}

	/* Everything comes back; from here on snapd has nothing to do with this process. */
	if (!error)
		snapd_leave();
	wrong = count_wrong(records);
	printf("%ld records are wrong\n", wrong);
	free(records);
	return wrong != 0;
}
