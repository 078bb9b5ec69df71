package events

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// tailOf opens the tail of an empty log, and a file that appends to it.
func tailOf(t *testing.T) (*Tail, *os.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "events.jsonl")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	check(t, err)
	t.Cleanup(func() { f.Close() })
	tail, err := OpenTail(path)
	check(t, err)
	t.Cleanup(func() { tail.Close() })
	return tail, f
}

func appendTo(t *testing.T, f *os.File, text string) {
	t.Helper()
	_, err := f.WriteString(text)
	check(t, err)
}

// kinds returns what the tail has now, as the kinds of the events.
func kinds(t *testing.T, tail *Tail) string {
	t.Helper()
	lines, events, err := tail.Next()
	check(t, err)
	if len(lines) != len(events) {
		t.Fatalf("%d lines with %d events", len(lines), len(events))
	}
	var out []string
	for i, e := range events {
		if !bytes.HasSuffix(lines[i], []byte("\n")) {
			t.Errorf("line %q has no end", lines[i])
		}
		out = append(out, e.Event)
	}
	return strings.Join(out, " ")
}

func TestEventTail(t *testing.T) {
	tail, f := tailOf(t)
	for _, c := range []struct{ text, want string }{
		{"", ""},
		{`{"event":"a"}` + "\n", "a"},
		{"", ""},
		{`{"eve`, ""},
		{`nt":"b"}`, ""},
		{"\n" + `{"event":"c"}` + "\n" + `{"event":`, "b c"},
		{`"d"}` + "\n", "d"},
		{`{"event":"torn` + "\n" + `{"event":"e"}` + "\n", "e"},
		{"\n[1]\nnull and void\n" + `{"event":"f","peer":"one"}` + "\n" + `{"event":"g"}` + "\n", "g"},
		{strings.Repeat(`{"event":"h"}`+"\n", 10000), strings.TrimSpace(strings.Repeat("h ", 10000))},
		{`{"event":"i","message":"` + strings.Repeat("x", 200<<10), ""}, // longer than the reader's buffer
		{`"}` + "\n", "i"},
	} {
		appendTo(t, f, c.text)
		if got := kinds(t, tail); got != c.want {
			t.Errorf("after %.60q: %.80q, want %.80q", c.text, got, c.want)
		}
	}
}

// A line that is too long is dropped without being held, whether it has an
// end or not, and what stands before and after it is read.
func TestEventTailLongLine(t *testing.T) {
	tail, f := tailOf(t)
	appendTo(t, f, `{"event":"a"}`+"\n"+`{"event":"long","message":"`)
	if got := kinds(t, tail); got != "a" {
		t.Errorf("got %q", got)
	}
	part := strings.Repeat("x", MaxLine/2)
	for range 6 {
		appendTo(t, f, part)
		if got := kinds(t, tail); got != "" {
			t.Errorf("got %q", got)
		}
		if len(tail.part) > MaxLine {
			t.Fatalf("%d bytes of a line are held", len(tail.part))
		}
	}
	appendTo(t, f, `"}`+"\n"+`{"event":"b"}`+"\n"+`{"event":"long","message":"`+strings.Repeat("x", MaxLine)+`"}`+"\n"+`{"event":"c"}`+"\n")
	if got := kinds(t, tail); got != "b c" {
		t.Errorf("got %q", got)
	}
	exact := `{"event":"d","message":""}` + "\n"
	appendTo(t, f, `{"event":"d","message":"`+strings.Repeat("x", MaxLine-len(exact))+`"}`+"\n")
	if got := kinds(t, tail); got != "d" {
		t.Errorf("got %q", got)
	}
}

func TestEventTailRefuses(t *testing.T) {
	_, err := OpenTail(filepath.Join(t.TempDir(), "none"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	_, err = OpenLog(filepath.Join(t.TempDir(), "no folder", "events.jsonl"))
	refused(t, err, "opening the event log", "no folder")
}

func TestEventRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.jsonl")
	log, err := OpenLog(path)
	check(t, err)
	defer log.Close()
	loss, accuracy := 0.25, 0.0
	sent := Event{
		Event: "round", Peer: 2, Slot: 3, Round: 4, Loss: &loss, Model: "ab", Members: []int{1, 2}, Seconds: 1.5, How: "fetched", Degraded: true,
		Used: &Usage{Invocations: 1, GBSeconds: 2, Bytes: 3, Timeouts: 4}, Accuracy: &accuracy, Samples: 5, State: "lost", PID: 6, By: 7,
		Message: "a \"line\"\nand another\u2028", Rounds: 8, Run: "runs/x", StopReason: "target", Usage: &Usage{Invocations: 9, GBSeconds: 10, Bytes: 11},
		Peers: []PeerDone{{1, "finished", 8, "ab"}},
	}
	before := time.Now()
	check(t, log.Emit(sent))
	if !sent.Time.IsZero() {
		t.Error("the caller's event was changed")
	}
	tail, err := OpenTail(path)
	check(t, err)
	defer tail.Close()
	lines, events, err := tail.Next()
	check(t, err)
	if len(events) != 1 {
		t.Fatalf("%d events", len(events))
	}
	got := events[0]
	if got.Time.Before(before.Add(-time.Second)) || got.Time.Location() != time.UTC {
		t.Errorf("the time is %v", got.Time)
	}
	got.Time = time.Time{}
	a, _ := json.Marshal(got)
	b, _ := json.Marshal(sent)
	if !bytes.Equal(a, b) {
		t.Errorf("got  %s\nwant %s", a, b)
	}
	// An accuracy or a number of timeouts of 0 is told; what is not set is not.
	for _, key := range []string{`"accuracy":0`, `"timeouts":0`} {
		if !bytes.Contains(lines[0], []byte(key)) {
			t.Errorf("%s lacks %s", lines[0], key)
		}
	}
	check(t, log.Emit(Event{Event: "warning"}))
	lines, _, err = tail.Next()
	check(t, err)
	var keys map[string]any
	check(t, json.Unmarshal(lines[0], &keys))
	if len(keys) != 2 {
		t.Errorf("an empty warning is %s", lines[0])
	}
	nan := math.NaN()
	refused(t, log.Emit(Event{Event: "round", Loss: &nan}), "event of kind round", "NaN")
}

// Many goroutines and files at once, as the processes of a run: no line is
// lost, none is mixed with another, and each writer's are in its order.
func TestEventLogWriters(t *testing.T) {
	const files, goroutines, each = 4, 4, 100
	path := filepath.Join(t.TempDir(), "events.jsonl")
	var wg sync.WaitGroup
	for i := range files {
		log, err := OpenLog(path)
		check(t, err)
		defer log.Close()
		for j := range goroutines {
			wg.Go(func() {
				for k := range each {
					e := Event{Event: "warning", Peer: i*goroutines + j + 1, Round: uint64(k + 1), Message: strings.Repeat(fmt.Sprint(k%10), k*37)}
					if err := log.Emit(e); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	tail, err := OpenTail(path)
	check(t, err)
	defer tail.Close()
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	total, last := 0, map[int]uint64{}
	for over := false; !over; {
		select {
		case <-ended:
			over = true // what is written is read once more
		default:
		}
		_, events, err := tail.Next()
		check(t, err)
		for _, e := range events {
			total++
			if e.Round != last[e.Peer]+1 || e.Message != strings.Repeat(fmt.Sprint((e.Round-1)%10), int(e.Round-1)*37) {
				t.Fatalf("event %d of writer %d, %d bytes, comes after %d", e.Round, e.Peer, len(e.Message), last[e.Peer])
			}
			last[e.Peer] = e.Round
		}
	}
	if total != files*goroutines*each {
		t.Errorf("%d events of %d", total, files*goroutines*each)
	}
}

// tornFile writes at most room bytes, as a disk that becomes full.
type tornFile struct {
	bytes.Buffer
	room int
}

func (f *tornFile) Write(p []byte) (int, error) {
	n, _ := f.Buffer.Write(p[:min(len(p), f.room)])
	if f.room -= n; n < len(p) {
		return n, errors.New("no space left on device")
	}
	return n, nil
}

func (f *tornFile) Close() error { return nil }

// An event for which the disk has no room is lost, but takes none with it
// that comes when there is room again.
func TestEventLogFullDisk(t *testing.T) {
	f := &tornFile{room: 100}
	log := &Log{f: f}
	check(t, log.Emit(Event{Event: "a"}))
	refused(t, log.Emit(Event{Event: "b"}), "writing an event", "no space")
	refused(t, log.Emit(Event{Event: "c"}), "no space")
	f.room = 1 << 20
	check(t, log.Emit(Event{Event: "d"}))
	check(t, log.Emit(Event{Event: "e"}))
	tail, err := OpenTail(writeTemp(t, f.String()))
	check(t, err)
	defer tail.Close()
	if got := kinds(t, tail); got != "a d e" {
		t.Errorf("got %q of\n%s", got, f)
	}
}

// What a full disk left of a line takes no event of the next process with it.
func TestEventLogTornBefore(t *testing.T) {
	for before, want := range map[string]string{
		"":                                "b c",
		`{"event":"a"}` + "\n":            "a b c",
		`{"event":"a"}` + "\n" + `{"eve`:  "a b c",
		`{"event":"a"}`:                   "a b c",
		`{"event":"a"}` + "\n" + "\x00\n": "a b c",
	} {
		path := writeTemp(t, before)
		for _, kind := range []string{"b", "c"} {
			log, err := OpenLog(path)
			check(t, err)
			check(t, log.Emit(Event{Event: kind}))
			check(t, log.Close())
		}
		tail, err := OpenTail(path)
		check(t, err)
		defer tail.Close()
		if got := kinds(t, tail); got != want {
			t.Errorf("after %q: got %q, want %q", before, got, want)
		}
		// A log that is whole gets no empty line.
		if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, []byte("\n\n")) {
			t.Errorf("after %q: %q, %v", before, b, err)
		}
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refused fails unless err says all of this.
func refused(t testing.TB, err error, says ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one that says %q", says)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("the error %q does not say %q", err, s)
		}
	}
}

// writeTemp makes a log with this content.
func writeTemp(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "events.jsonl")
	check(t, os.WriteFile(path, []byte(content), 0o644))
	return path
}

// BenchmarkEmit is what telling of a round costs a peer.
func BenchmarkEmit(b *testing.B) {
	log, err := OpenLog(filepath.Join(b.TempDir(), "events.jsonl"))
	check(b, err)
	defer log.Close()
	loss := 0.25
	e := Event{
		Event: "round", Peer: 2, Slot: 3, Round: 4, Loss: &loss, Model: strings.Repeat("ab", 32), Members: []int{1, 2, 3, 4}, Seconds: .02, How: "recomputed", Samples: 64,
		Used: &Usage{}, Spent: &Spent{}, Instances: 2,
	}
	for _, s := range Steps[:6] {
		e.Steps = append(e.Steps, Step{s, 1.25, 3.5})
	}
	for p := range 3 {
		e.Traffic = append(e.Traffic, Traffic{p + 1, 1 << 20, 1 << 20})
	}
	for b.Loop() {
		check(b, log.Emit(e))
	}
}
