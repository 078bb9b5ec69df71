//go:build unix

package function

import "golang.org/x/sys/unix"

// read takes in output until the pipe is closed at either end.
func (o *output) read() {
	raw, err := o.r.SyscallConn()
	if err != nil {
		return
	}
	raw.Read(o.take)
}

// drain takes in what is in the pipe now, so that nothing printed before this call is missing after it.
func (o *output) drain() {
	if raw, err := o.r.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { o.take(fd) })
	}
}

// take empties the pipe and reports whether its other end is closed. The pipe does not block.
func (o *output) take(fd uintptr) (closed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		n, err := unix.Read(int(fd), o.buf[:])
		switch {
		case n > 0:
			o.addLocked(o.buf[:n])
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return false
		default: // end of the output
			return true
		}
	}
}
