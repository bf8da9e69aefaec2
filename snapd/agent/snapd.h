/* snapd for C programs: let a snapd daemon manage this process's heap.
 *
 * Link with libsnapd-agent.so (`python -m snapd.agent` prints its path), or start the program by `snapd run`.
 */
#ifndef SNAPD_H
#define SNAPD_H

#ifdef __cplusplus
extern "C" {
#endif

/* Starts the agent. socket_path is the daemon's agent socket: RUNTIME/agent.sock. No daemon need run yet; the agent
 * joins when one comes up. Returns 0, or a negative errno: -EALREADY when an agent runs already, -EINVAL for no path,
 * -ENOMEM or -EAGAIN when the system refuses memory or a thread. */
int snapd_cooperate(const char *socket_path);

/* Ends the cooperation: all pages come back first. Returns 0, -ESRCH when no agent runs, or -EBUSY when for ten seconds
 * no daemon could give back what may be out: then the agent stays. */
int snapd_leave(void);

#ifdef __cplusplus
}
#endif

#endif
