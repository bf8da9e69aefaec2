/* Entry header of the engine for the generated cffi module and for the engine's own files. */
#ifndef SN_ENGINE_H
#define SN_ENGINE_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stddef.h>
#include <stdint.h>
struct sn_session;
struct sn_store;
struct sn_piece;
#include "api.h"
#endif
