package tensordb

import "golang.org/x/sys/unix"

// largePages asks for pages of 2 MB, for fewer page faults; a system that has
// none goes on without.
func largePages(b []byte) { unix.Madvise(b, unix.MADV_HUGEPAGE) }
