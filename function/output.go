package function

import (
	"bytes"
	"os"
	"strings"
	"sync"
)

// Bounds of what is kept of an instance's output.
const (
	keptOutput = 16 << 10
	longLine   = 4 << 10   // longer lines are logged in pieces
	maxLogged  = 256 << 10 // bytes logged of one attempt: a function that prints without end must fill no disk
)

// output collects what an instance prints on standard output and standard error, through one pipe so that the order
// holds. The last keptOutput bytes are kept; whole lines go to a log.
type output struct {
	w    *os.File // the instance's end
	r    *os.File
	done chan struct{} // closed when the reading goroutine has ended
	log  func(line string)

	mu     sync.Mutex
	kept   []byte
	total  int64 // bytes ever printed
	marked int64 // total at the begin of the attempt
	logged int   // bytes logged since then
	line   []byte
	buf    [4 << 10]byte // of whoever reads, under mu
}

func newOutput(log func(line string)) (*output, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	return &output{r: r, w: w, done: make(chan struct{}), log: log}, nil
}

// started is to be called once when the process has its end of the pipe, or will never have it.
func (o *output) started() {
	o.w.Close()
	go func() {
		defer close(o.done)
		o.read()
	}()
}

// close ends the reading, also where a process that left the group still holds the pipe.
func (o *output) close() {
	o.drain()
	o.r.Close()
	<-o.done
	o.mu.Lock()
	defer o.mu.Unlock()
	o.logLocked()
}

// addLocked takes in bytes that were read.
func (o *output) addLocked(b []byte) {
	o.total += int64(len(b))
	o.kept = append(o.kept, b...)
	if over := len(o.kept) - keptOutput; over > 0 {
		o.kept = append(o.kept[:0], o.kept[over:]...)
	}
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			o.line = append(o.line, b...)
			if len(o.line) >= longLine {
				o.logLocked()
			}
			return
		}
		o.line = append(o.line, b[:i]...)
		o.logLocked()
		b = b[i+1:]
	}
}

func (o *output) logLocked() {
	line := strings.TrimRight(string(o.line), "\r")
	o.line = o.line[:0]
	if line == "" || o.logged > maxLogged {
		return
	}
	if o.logged += len(line); o.logged > maxLogged {
		line = "(further output of this attempt is not logged)"
	}
	o.log(line)
}

// mark begins the output of an attempt.
func (o *output) mark() {
	o.drain()
	o.mu.Lock()
	o.marked, o.logged = o.total, 0
	o.mu.Unlock()
}

// sinceMark returns what is kept of the output since mark, with all that was printed before the call.
func (o *output) sinceMark() []byte {
	o.drain()
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := min(o.total-o.marked, int64(len(o.kept))); n > 0 {
		return bytes.Clone(o.kept[int64(len(o.kept))-n:])
	}
	return nil
}

// last returns the last lines that were printed, up to the given numbers of lines and bytes.
func (o *output) last(lines, size int) string {
	o.drain()
	o.mu.Lock()
	defer o.mu.Unlock()
	b := bytes.TrimSpace(o.kept)
	b = b[max(0, len(b)-size):]
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] == '\n' {
			if lines--; lines == 0 {
				b = b[i+1:]
				break
			}
		}
	}
	return strings.ToValidUTF8(string(b), "\uFFFD")
}
