//go:build unix

package tensordb

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugeMin is the smallest buffer for which large pages pay.
const hugeMin = 4 << 20

// shift is by how much more each buffer starts behind the start of a page than
// the one before: where several are read at once, those that start alike get in
// each other's way in the cache.
const shift = 9 * 64

// mapBuffer returns n bytes; nth is how many were mapped before.
func mapBuffer(n int, nth uint64) ([]byte, error) {
	page := os.Getpagesize()
	p, err := unix.MmapPtr(-1, 0, nil, uintptr(n+page), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	b := unsafe.Slice((*byte)(p), n+page)
	if n >= hugeMin {
		largePages(b)
	}
	start := int(nth * shift % uint64(page))
	return b[start : start+n : start+n], nil
}

func unmapBuffer(b []byte) {
	page := os.Getpagesize()
	first := unsafe.Pointer(unsafe.SliceData(b))
	base := unsafe.Add(first, -int(uintptr(first)&uintptr(page-1)))
	if err := unix.MunmapPtr(base, uintptr(len(b)+page)); err != nil {
		panic("tensordb: unmapping a buffer: " + err.Error())
	}
}
