/* The bench's heap of pages that look like a program's is the tests' too, with what targets share. */
#ifndef TARGETS_CONTENT_H
#define TARGETS_CONTENT_H

#include "common.h"

#include "../../snapd/bench/content.h"

#endif
