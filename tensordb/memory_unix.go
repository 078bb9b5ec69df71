//go:build unix

package tensordb

import "golang.org/x/sys/unix"

// hugeMin is the smallest buffer for which large pages pay.
const hugeMin = 4 << 20

func mapBuffer(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err == nil && n >= hugeMin {
		largePages(b)
	}
	return b, err
}

func unmapBuffer(b []byte) {
	if err := unix.Munmap(b); err != nil {
		panic("tensordb: unmapping a buffer: " + err.Error())
	}
}
