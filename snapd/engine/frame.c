/* Frames: one page each, compressed, with a check that binds it to its store and its place (docs/format.md).
 *
 * Owns the codec's pointer table and the frame header; knows nothing of files or sessions.
 */
#include "internal.h"

#include <stdlib.h>

typedef void *(*create_fn)(void);
typedef size_t (*destroy_fn)(void *);
typedef size_t (*set_fn)(void *, int, int);
typedef size_t (*code_fn)(void *, void *, size_t, const void *, size_t);
typedef unsigned int (*is_error_fn)(size_t);

#define CODEC_RAW 0
#define CODEC_ZSTD 1
#define ZSTD_LEVEL 100        /* ZSTD_c_compressionLevel */
#define ZSTD_CONTENT_SIZE 200 /* ZSTD_c_contentSizeFlag */

static struct {
	create_fn create_cctx, create_dctx;
	destroy_fn free_cctx, free_dctx;
	set_fn set_cctx;
	code_fn compress2, decompress_dctx;
	is_error_fn is_error;
} codec;

static uint32_t crc_table[8][256];

struct frame_packer {
	void *cctx;
	int level;
};
struct frame_opener {
	void *dctx;
};
struct frame_header {
	uint32_t crc;
	uint16_t payload;
	uint8_t flags, dictionary;
};
_Static_assert(sizeof(struct frame_header) == FRAME_HEADER, "docs/format.md");

static void make_crc_tables(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int k = 0; k < 8; k++)
			crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
		crc_table[0][i] = crc;
	}
	for (int k = 1; k < 8; k++)
		for (int i = 0; i < 256; i++)
			crc_table[k][i] = crc_table[k - 1][i] >> 8 ^ crc_table[0][crc_table[k - 1][i] & 255];
}

/* zlib's CRC-32 by eight tables: Python checks the same frames with zlib.crc32. */
uint32_t frame_crc(uint32_t crc, const void *data, size_t bytes)
{
	const unsigned char *p = data;

	crc = ~crc;
	for (; bytes >= 8; bytes -= 8, p += 8) {
		uint32_t low, high;

		memcpy(&low, p, 4);
		memcpy(&high, p + 4, 4);
		low ^= crc;
		crc = crc_table[7][low & 255] ^ crc_table[6][low >> 8 & 255] ^ crc_table[5][low >> 16 & 255] ^
		      crc_table[4][low >> 24] ^ crc_table[3][high & 255] ^ crc_table[2][high >> 8 & 255] ^
		      crc_table[1][high >> 16 & 255] ^ crc_table[0][high >> 24];
	}
	while (bytes--)
		crc = crc >> 8 ^ crc_table[0][(crc ^ *p++) & 255];
	return ~crc;
}

void frame_use_codec(const struct sn_codec *pointers)
{
	codec.create_cctx = (create_fn)pointers->create_cctx;
	codec.free_cctx = (destroy_fn)pointers->free_cctx;
	codec.set_cctx = (set_fn)pointers->set_cctx;
	codec.compress2 = (code_fn)pointers->compress2;
	codec.create_dctx = (create_fn)pointers->create_dctx;
	codec.free_dctx = (destroy_fn)pointers->free_dctx;
	codec.decompress_dctx = (code_fn)pointers->decompress_dctx;
	codec.is_error = (is_error_fn)pointers->is_error;
	make_crc_tables();
}

struct frame_packer *frame_packer_create(void)
{
	struct frame_packer *packer = calloc(1, sizeof(*packer));

	if (!packer)
		return NULL;
	packer->cctx = codec.create_cctx();
	packer->level = 1 << 30;
	if (!packer->cctx) {
		free(packer);
		return NULL;
	}
	return packer;
}

void frame_packer_destroy(struct frame_packer *packer)
{
	if (!packer)
		return;
	codec.free_cctx(packer->cctx);
	free(packer);
}

uint32_t frame_pack(struct frame_packer *packer, int level, const void *page, unsigned char *room)
{
	struct frame_header *header = (struct frame_header *)room;
	size_t payload;
	uint32_t bytes;

	if (packer->level != level) {
		codec.set_cctx(packer->cctx, ZSTD_LEVEL, level);
		packer->level = level;
	}
	payload = codec.compress2(packer->cctx, room + FRAME_HEADER, PAGE - 1, page, PAGE);
	*header = (struct frame_header){.flags = CODEC_ZSTD};
	if (codec.is_error(payload) || payload >= PAGE) {
		memcpy(room + FRAME_HEADER, page, PAGE);
		payload = PAGE;
		header->flags = CODEC_RAW;
	}
	header->payload = (uint16_t)payload;
	bytes = (uint32_t)(FRAME_HEADER + payload + 7) & ~7u;
	memset(room + FRAME_HEADER + payload, 0, bytes - FRAME_HEADER - payload);
	return bytes;
}

static uint32_t frame_check(const struct sn_store *store, uint64_t offset, const unsigned char *frame)
{
	struct frame_header header;

	memcpy(&header, frame, sizeof(header));
	return frame_crc(frame_crc(store->id_crc, &offset, sizeof(offset)), frame + sizeof(header.crc),
			 FRAME_HEADER - sizeof(header.crc) + header.payload);
}

void frame_seal(const struct sn_store *store, uint64_t offset, unsigned char *frame)
{
	uint32_t crc = frame_check(store, offset, frame);

	memcpy(frame, &crc, sizeof(crc));
}

struct frame_opener *frame_opener_create(void)
{
	struct frame_opener *opener = calloc(1, sizeof(*opener));

	if (!opener)
		return NULL;
	opener->dctx = codec.create_dctx();
	if (!opener->dctx) {
		free(opener);
		return NULL;
	}
	return opener;
}

void frame_opener_destroy(struct frame_opener *opener)
{
	if (!opener)
		return;
	codec.free_dctx(opener->dctx);
	free(opener);
}

bool frame_is_whole(const struct sn_store *store, uint64_t offset, const unsigned char *frame, uint64_t bytes)
{
	struct frame_header header;

	if (bytes < FRAME_HEADER || bytes > FRAME_MAX)
		return false;
	memcpy(&header, frame, sizeof(header));
	return header.payload && FRAME_HEADER + (uint64_t)header.payload <= bytes &&
	       header.crc == frame_check(store, offset, frame);
}

enum frame_error frame_open(struct frame_opener *opener, const struct sn_store *store, uint64_t offset,
			    const unsigned char *frame, uint64_t bytes, void *page)
{
	struct frame_header header;

	if (bytes < FRAME_HEADER || bytes > FRAME_MAX)
		return FRAME_BAD_ENTRY;
	if (!frame_is_whole(store, offset, frame, bytes))
		return FRAME_BAD_CHECK;
	memcpy(&header, frame, sizeof(header));
	if (header.dictionary)
		return FRAME_BAD_DECODE;
	if (header.flags == CODEC_RAW && header.payload == PAGE) {
		memcpy(page, frame + FRAME_HEADER, PAGE);
		return FRAME_OK;
	}
	if (header.flags != CODEC_ZSTD ||
	    codec.decompress_dctx(opener->dctx, page, PAGE, frame + FRAME_HEADER, header.payload) != PAGE)
		return FRAME_BAD_DECODE;
	return FRAME_OK;
}
