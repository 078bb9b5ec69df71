package spirt

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Event is one line of a run's events.jsonl. Which fields are set depends on
// Event, its kind; the README of the run folder, docs/run-folder.md, lists
// them. Accuracies are fractions from 0 to 1, Model is a model hash.
type Event struct {
	Time  time.Time `json:"time"`
	Event string    `json:"event"`

	// round: one peer has finished one round.
	Peer     int      `json:"peer,omitempty"` // 1 to the number of peers
	Slot     uint64   `json:"slot,omitempty"`
	Round    uint64   `json:"round,omitempty"`
	Loss     *float64 `json:"loss,omitempty"` // mean over the peer's minibatches; in validation, done and eval over the samples
	Model    string   `json:"model,omitempty"`
	Members  []int    `json:"members,omitempty"` // whose averages the round contains
	Seconds  float64  `json:"seconds,omitempty"`
	How      string   `json:"how,omitempty"` // recomputed, fetched or reorganised
	Degraded bool     `json:"degraded,omitempty"`
	Used     *Usage   `json:"usage,omitempty"` // by the peer since it started

	// validation, eval: Accuracy and Loss; eval also Samples.
	Accuracy *float64 `json:"accuracy,omitempty"`
	Samples  int      `json:"samples,omitempty"`

	// peer: Peer is now in State; By saw it (0: the process that started it).
	State string `json:"state,omitempty"`
	PID   int    `json:"pid,omitempty"`
	By    int    `json:"by,omitempty"`

	// warning: Peer reports something refused, dropped or late.
	Message string `json:"message,omitempty"`

	// done: the run is over. Usage is that of all peers; without a timeout
	// the same seed gives the same model.
	Rounds     uint64 `json:"rounds,omitempty"`
	Run        string `json:"run,omitempty"`
	StopReason string `json:"stop_reason,omitempty"`
	*Usage
	Peers []PeerDone `json:"peers,omitempty"`
}

// Usage counts what one or all peers have used since they started.
type Usage struct {
	Invocations int     `json:"invocations"`
	GBSeconds   float64 `json:"gb_seconds"` // billed time x configured memory
	Bytes       int64   `json:"bytes"`      // sent to other peers
	Timeouts    int     `json:"timeouts"`   // protocol timeouts that fired
}

// PeerDone is how one peer ended.
type PeerDone struct {
	Peer  int    `json:"peer"`
	State string `json:"state"` // finished, or how it was lost
	Round uint64 `json:"round"`
	Model string `json:"model,omitempty"`
}

// eventLog appends events to a file. Lines of several processes do not mix:
// each is one write to a file opened for appending.
type eventLog struct {
	mu   sync.Mutex
	f    io.WriteCloser
	torn bool // the last write may have left a part of a line
}

func openEventLog(path string) (*eventLog, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the event log: %w", err)
	}
	return &eventLog{f: f}, nil
}

// emit stamps and writes one event.
func (l *eventLog) emit(e Event) error {
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

func (l *eventLog) Close() error { return l.f.Close() }

// maxEventLine bounds one line of an event log in bytes; a longer one is
// skipped.
const maxEventLine = 1 << 20

// eventTail reads events from a log that others still append to.
type eventTail struct {
	f    *os.File
	r    *bufio.Reader
	part []byte // a line whose end is not written yet
	long bool   // that line is too long: the rest of it is dropped
}

func openEventTail(path string) (*eventTail, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &eventTail{f: f, r: bufio.NewReaderSize(f, 64<<10)}, nil
}

// next returns the lines that are complete by now, with the event in each. It
// returns none at the present end of the log.
func (t *eventTail) next() (lines [][]byte, events []Event, err error) {
	for {
		b, err := t.r.ReadSlice('\n')
		if t.long = t.long || len(t.part)+len(b) > maxEventLine; t.long {
			t.part = t.part[:0]
		} else {
			t.part = append(t.part, b...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF):
			return lines, events, nil
		case err != nil:
			return lines, events, err
		}
		line := bytes.Clone(t.part)
		t.part, t.long = t.part[:0], false
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			continue // a line torn by a full disk is skipped, not fatal
		}
		lines, events = append(lines, line), append(events, e)
	}
}

func (t *eventTail) Close() error { return t.f.Close() }

// wait blocks for d or until ctx is done, which it reports.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
