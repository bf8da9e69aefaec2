/* Kernel constants and structures that distribution headers may lack (Linux 6.8 and later has all of them).
 *
 * Owns numbers and layouts only; knows nothing of snapd. Source: include/uapi/linux/{userfaultfd,fs,mman}.h.
 */
#ifndef SNAPD_UAPI_H
#define SNAPD_UAPI_H

#include <linux/types.h>

#define SNAPD_PAGE 4096UL
#define SNAPD_PAGE_SHIFT 12

#define SNAPD_MREMAP_MAYMOVE 1
#define SNAPD_MREMAP_FIXED 2
#define SNAPD_MREMAP_DONTUNMAP 4

#define SNAPD_MADV_DONTFORK 10
#define SNAPD_MADV_DOFORK 11
#define SNAPD_MADV_POPULATE_WRITE 23
#define SNAPD_MADV_COLLAPSE 25
#define SNAPD_MADV_GUARD_INSTALL 102

/* userfaultfd */
#define SNAPD_UFFD_API 0xAAULL
#define SNAPD_UFFD_EVENT_PAGEFAULT 0x12
#define SNAPD_UFFD_EVENT_FORK 0x13
#define SNAPD_UFFD_EVENT_REMAP 0x14
#define SNAPD_UFFD_EVENT_REMOVE 0x15
#define SNAPD_UFFD_EVENT_UNMAP 0x16
#define SNAPD_UFFD_PAGEFAULT_WRITE (1ULL << 0)

#define SNAPD_UFFD_FEATURE_PAGEFAULT_FLAG_WP (1ULL << 0)
#define SNAPD_UFFD_FEATURE_EVENT_FORK (1ULL << 1)
#define SNAPD_UFFD_FEATURE_EVENT_REMAP (1ULL << 2)
#define SNAPD_UFFD_FEATURE_EVENT_REMOVE (1ULL << 3)
#define SNAPD_UFFD_FEATURE_EVENT_UNMAP (1ULL << 6)
#define SNAPD_UFFD_FEATURE_WP_UNPOPULATED (1ULL << 13)
#define SNAPD_UFFD_FEATURE_POISON (1ULL << 14)
#define SNAPD_UFFD_FEATURE_WP_ASYNC (1ULL << 15)
#define SNAPD_UFFD_FEATURE_MOVE (1ULL << 16)

#define SNAPD_UFFDIO_REGISTER_MODE_MISSING (1ULL << 0)
#define SNAPD_UFFDIO_REGISTER_MODE_WP (1ULL << 1)
#define SNAPD_UFFDIO_COPY_MODE_DONTWAKE (1ULL << 0)
#define SNAPD_UFFDIO_COPY_MODE_WP (1ULL << 1)
#define SNAPD_UFFDIO_WRITEPROTECT_MODE_WP (1ULL << 0)
#define SNAPD_UFFDIO_ZEROPAGE_MODE_DONTWAKE (1ULL << 0)
#define SNAPD_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES (1ULL << 1)

struct snapd_uffd_range {
	__u64 start, len;
};
struct snapd_uffd_api {
	__u64 api, features, ioctls;
};
struct snapd_uffd_register {
	struct snapd_uffd_range range;
	__u64 mode, ioctls;
};
struct snapd_uffd_copy {
	__u64 dst, src, len, mode;
	__s64 copy;
};
struct snapd_uffd_zeropage {
	struct snapd_uffd_range range;
	__u64 mode;
	__s64 zeropage;
};
struct snapd_uffd_move {
	__u64 dst, src, len, mode;
	__s64 move;
};
struct snapd_uffd_poison {
	struct snapd_uffd_range range;
	__u64 mode;
	__s64 updated;
};
struct snapd_uffd_writeprotect {
	struct snapd_uffd_range range;
	__u64 mode;
};
struct snapd_uffd_msg {
	__u8 event, reserved1;
	__u16 reserved2;
	__u32 reserved3;
	union {
		struct {
			__u64 flags, address;
			__u32 ptid;
		} fault;
		struct {
			__u32 ufd;
		} fork;
		struct {
			__u64 from, to, len;
		} remap;
		struct {
			__u64 start, end;
		} remove; /* UNMAP has the same shape */
		__u64 words[3];
	} arg;
};

#define SNAPD_UFFDIO(dir, nr, type) (((dir) << 30) | (sizeof(type) << 16) | (0xAAUL << 8) | (nr))
#define SNAPD_USERFAULTFD_IOC_NEW 0xAA00UL
#define SNAPD_UFFDIO_API SNAPD_UFFDIO(3UL, 0x3F, struct snapd_uffd_api)
#define SNAPD_UFFDIO_REGISTER SNAPD_UFFDIO(3UL, 0x00, struct snapd_uffd_register)
#define SNAPD_UFFDIO_UNREGISTER SNAPD_UFFDIO(2UL, 0x01, struct snapd_uffd_range)
#define SNAPD_UFFDIO_WAKE SNAPD_UFFDIO(2UL, 0x02, struct snapd_uffd_range)
#define SNAPD_UFFDIO_COPY SNAPD_UFFDIO(3UL, 0x03, struct snapd_uffd_copy)
#define SNAPD_UFFDIO_ZEROPAGE SNAPD_UFFDIO(3UL, 0x04, struct snapd_uffd_zeropage)
#define SNAPD_UFFDIO_MOVE SNAPD_UFFDIO(3UL, 0x05, struct snapd_uffd_move)
#define SNAPD_UFFDIO_WRITEPROTECT SNAPD_UFFDIO(3UL, 0x06, struct snapd_uffd_writeprotect)
#define SNAPD_UFFDIO_POISON SNAPD_UFFDIO(3UL, 0x08, struct snapd_uffd_poison)

/* PAGEMAP_SCAN and PROCMAP_QUERY on files of /proc/PID */
#define SNAPD_PAGE_IS_WPALLOWED (1ULL << 0)
#define SNAPD_PAGE_IS_WRITTEN (1ULL << 1)
#define SNAPD_PAGE_IS_FILE (1ULL << 2)
#define SNAPD_PAGE_IS_PRESENT (1ULL << 3)
#define SNAPD_PAGE_IS_SWAPPED (1ULL << 4)
#define SNAPD_PAGE_IS_PFNZERO (1ULL << 5)
#define SNAPD_PAGE_IS_HUGE (1ULL << 6)
#define SNAPD_PAGE_IS_GUARD (1ULL << 8)

struct snapd_page_region {
	__u64 start, end, categories;
};
struct snapd_pm_scan {
	__u64 size, flags, start, end, walk_end, vec, vec_len, max_pages;
	__u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct snapd_procmap_query {
	__u64 size, query_flags, query_addr;
	__u64 vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
	__u32 dev_major, dev_minor, vma_name_size, build_id_size;
	__u64 vma_name_addr, build_id_addr;
};
#define SNAPD_PAGEMAP_SCAN ((3UL << 30) | (sizeof(struct snapd_pm_scan) << 16) | ('f' << 8) | 16)
#define SNAPD_PROCMAP_QUERY ((3UL << 30) | (sizeof(struct snapd_procmap_query) << 16) | ('f' << 8) | 17)
#define SNAPD_PROCMAP_VMA_READABLE 0x01
#define SNAPD_PROCMAP_VMA_WRITABLE 0x02
#define SNAPD_PROCMAP_VMA_SHARED 0x08
#define SNAPD_PROCMAP_COVERING_OR_NEXT 0x10

#endif
