package events

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Log appends events to a file. Lines of several processes do not mix:
// each is one write to a file opened for appending.
type Log struct {
	mu   sync.Mutex
	f    io.WriteCloser
	torn bool // the log may end in a part of a line
}

func OpenLog(path string) (*Log, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the event log: %w", err)
	}
	return &Log{f: f, torn: endsTorn(f)}, nil
}

// endsTorn reports whether a file ends in a part of a line, which a full disk
// may have left of an earlier process. In doubt it does: an empty line costs
// nothing.
func endsTorn(f *os.File) bool {
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return err != nil
	}
	var last [1]byte
	_, err = f.ReadAt(last[:], info.Size()-1)
	return err != nil || last[0] != '\n'
}

// Emit stamps and writes one event.
func (l *Log) Emit(e Event) error {
	e.Time = time.Now().UTC()
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encoding an event of kind %s: %w", e.Event, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	line = append(line, '\n')
	if l.torn { // by a full disk: only that line is lost
		line = append([]byte{'\n'}, line...)
	}
	_, err = l.f.Write(line)
	if l.torn = err != nil; l.torn {
		return fmt.Errorf("writing an event: %w", err)
	}
	return nil
}

func (l *Log) Close() error { return l.f.Close() }

// MaxLine bounds one line of an event log in bytes; a longer one is
// skipped.
const MaxLine = 1 << 20

// Tail reads events from a log that others still append to.
type Tail struct {
	f    *os.File
	r    *bufio.Reader
	part []byte // a line whose end is not written yet
	long bool   // that line is too long: the rest of it is dropped

	skipped int // lines that were no events
}

// Skipped returns how many lines were too long or torn so far, with what stands
// at the end of the log without an end of its own.
func (t *Tail) Skipped() int {
	if len(t.part) > 0 || t.long {
		return t.skipped + 1
	}
	return t.skipped
}

func OpenTail(path string) (*Tail, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &Tail{f: f, r: bufio.NewReaderSize(f, 64<<10)}, nil
}

// Next returns the lines that are complete by now, with the event in each. It
// returns none at the present end of the log.
func (t *Tail) Next() (lines [][]byte, events []Event, err error) {
	err = t.EachLine(func(line []byte, e *Event) {
		lines, events = append(lines, bytes.Clone(line)), append(events, *e)
	})
	return lines, events, err
}

// Each is Next for who looks at each event once: it calls f with those that are
// complete by now, and keeps none.
func (t *Tail) Each(f func(*Event)) error {
	return t.EachLine(func(_ []byte, e *Event) { f(e) })
}

// EachLine is Each with the line too, which is valid until f returns.
func (t *Tail) EachLine(f func(line []byte, e *Event)) error {
	for {
		b, err := t.r.ReadSlice('\n')
		if t.long = t.long || len(t.part)+len(b) > MaxLine; t.long {
			t.part = t.part[:0]
		} else {
			t.part = append(t.part, b...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		var e Event
		err = json.Unmarshal(t.part, &e)
		if err == nil {
			f(t.part, &e)
		} else if t.long || len(bytes.TrimSpace(t.part)) > 0 {
			t.skipped++ // a line torn by a full disk is skipped, not fatal
		}
		t.part, t.long = t.part[:0], false
	}
}

func (t *Tail) Close() error { return t.f.Close() }
