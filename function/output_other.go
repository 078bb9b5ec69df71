//go:build !unix

package function

// read takes in output until the pipe is closed at either end.
func (o *output) read() {
	var buf [4 << 10]byte
	for {
		n, err := o.r.Read(buf[:])
		o.mu.Lock()
		o.addLocked(buf[:n])
		o.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// drain does nothing here: what was printed just before may be missing.
func (o *output) drain() {}
