package tensorboard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// A scalar as a reader finds it.
type scalar struct {
	step  uint64
	value float32
	at    float64
}

// crc32c computes the checksum bit by bit, by its polynomial alone.
func crc32c(b []byte) uint32 {
	c := ^uint32(0)
	for _, x := range b {
		c ^= uint32(x)
		for range 8 {
			c = c>>1 ^ 0x82f63b78*(c&1)
		}
	}
	c = ^c
	return (c>>15 | c<<17) + 0xa282ead8
}

// fields reads a message of protocol buffers: varints and fixed-size numbers as
// 8 bytes, little-endian.
func fields(b []byte) (map[int][][]byte, error) {
	all := map[int][][]byte{}
	for len(b) > 0 {
		key, n := binary.Uvarint(b)
		if n <= 0 {
			return nil, errors.New("torn key")
		}
		b = b[n:]
		var v []byte
		switch key & 7 {
		case 0:
			x, n := binary.Uvarint(b)
			if n <= 0 {
				return nil, errors.New("torn number")
			}
			v, b = binary.LittleEndian.AppendUint64(nil, x), b[n:]
		case 1:
			v, b = b[:8], b[8:]
		case 2:
			x, n := binary.Uvarint(b)
			if n <= 0 || x > uint64(len(b)-n) {
				return nil, errors.New("torn bytes")
			}
			v, b = b[n:n+int(x)], b[n+int(x):]
		case 5:
			v, b = append(bytes.Clone(b[:4]), 0, 0, 0, 0), b[4:]
		default:
			return nil, fmt.Errorf("wire type %d", key&7)
		}
		all[int(key>>3)] = append(all[int(key>>3)], v)
	}
	return all, nil
}

// read reads an event file, and checks its form.
func read(t *testing.T, path string) map[string][]scalar {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]scalar{}
	for first := true; len(b) > 0; first = false {
		if len(b) < 16 {
			t.Fatalf("%d bytes at the end", len(b))
		}
		n := binary.LittleEndian.Uint64(b)
		if n > uint64(len(b)-16) {
			t.Fatalf("a record of %d bytes", n)
		}
		message := b[12 : 12+n]
		if binary.LittleEndian.Uint32(b[8:]) != crc32c(b[:8]) || binary.LittleEndian.Uint32(b[12+n:]) != crc32c(message) {
			t.Fatal("a checksum is wrong")
		}
		b = b[16+n:]
		e, err := fields(message)
		if err != nil {
			t.Fatal(err)
		}
		if first {
			if v := e[3]; len(v) != 1 || string(v[0]) != "brain.Event:2" {
				t.Fatalf("version %q", v)
			}
			continue
		}
		s, err := fields(e[5][0])
		if err != nil {
			t.Fatal(err)
		}
		v, err := fields(s[1][0])
		if err != nil {
			t.Fatal(err)
		}
		tag := string(v[1][0])
		all[tag] = append(all[tag], scalar{binary.LittleEndian.Uint64(e[2][0]),
			math.Float32frombits(binary.LittleEndian.Uint32(v[2][0])), math.Float64frombits(binary.LittleEndian.Uint64(e[1][0]))})
	}
	return all
}

func start() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 500e6, time.UTC) }

// round is a round of a peer, told so many seconds after the start.
func round(peer int, n uint64, loss, after float64) *events.Event {
	return &events.Event{Event: "round", Peer: peer, Round: n, Loss: &loss, Seconds: 0.5, Samples: 64, Members: []int{1, 2},
		Spent: &events.Spent{CostUSD: bill.USD / 4}, Time: start().Add(time.Duration(after * float64(time.Second)))}
}

func (w *Writer) all(t *testing.T, all ...*events.Event) {
	t.Helper()
	for _, e := range all {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
	}
}

func steps(s []scalar) (all []uint64) {
	for _, x := range s {
		all = append(all, x.step)
	}
	return all
}

func TestScalars(t *testing.T) {
	w, err := Create(filepath.Join(t.TempDir(), "new", "folder"))
	if err != nil {
		t.Fatal(err)
	}
	accuracy, loss := 0.875, 0.75
	validation := &events.Event{Event: "validation", Peer: 1, Round: 1, Accuracy: &accuracy, Loss: &loss, Time: start()}
	again := *validation
	again.Peer = 2
	w.all(t, &events.Event{Event: "run", State: "started"}, round(1, 1, 1, 0), round(1, 2, 0.5, 1), round(2, 1, 3, 2), validation, &again, round(2, 2, 1.5, 3))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	at := float64(start().UnixMilli()) / 1000
	want := map[string][]scalar{
		"peer/1/loss":         {{1, 1, at}, {2, 0.5, at + 1}},
		"peer/2/loss":         {{1, 3, at + 2}, {2, 1.5, at + 3}},
		"loss":                {{1, 2, at + 2}, {2, 1, at + 3}},
		"round/seconds":       {{1, 0.5, at + 2}, {2, 0.5, at + 3}},
		"cost/usd_per_round":  {{1, 0.5, at + 2}, {2, 0.5, at + 3}},
		"images_per_second":   {{1, 256, at + 2}, {2, 256, at + 3}},
		"validation/loss":     {{1, 0.75, at}},
		"validation/accuracy": {{1, 0.875, at}},
	}
	if got := read(t, w.Path()); !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("%v\nwant\n%v", got, want)
	}
}

// Rounds ascend however the peers tell them, and none waits for ever.
func TestOrder(t *testing.T) {
	w, err := Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	w.all(t, round(1, 2, 1, 0), round(1, 2, 9, 0)) // the same peer again is no other one
	w.all(t, round(2, 2, 1, 0), round(2, 1, 1, 0)) // round 2 is written: 1 is too late
	for n := uint64(3); n <= 12; n++ {             // peer 2 is gone
		w.all(t, round(1, n, float64(n), 0))
	}
	w.all(t, round(2, 3, 5, 0), round(2, 12, 14, 0)) // too late, and in time
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	got := read(t, w.Path())["loss"]
	if want := []uint64{2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}; !slices.Equal(steps(got), want) {
		t.Errorf("rounds %v, want %v", steps(got), want)
	}
	if got[0].value != 1 || got[1].value != 3 || got[10].value != 13 {
		t.Error(got)
	}
}

// A run that is resumed goes back to its last checkpoint.
func TestResumed(t *testing.T) {
	w, err := Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	accuracy := 0.5
	validation := &events.Event{Event: "validation", Peer: 1, Round: 2, Accuracy: &accuracy}
	w.all(t, round(1, 1, 1, 0), round(2, 1, 1, 0), round(1, 2, 1, 0), round(2, 2, 1, 0), round(1, 3, 1, 0), validation,
		&events.Event{Event: "run", State: "resumed"}, round(1, 2, 1, 0), round(2, 2, 1, 0), validation)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	all := read(t, w.Path())
	if got, want := steps(all["loss"]), []uint64{1, 2, 3, 2}; !slices.Equal(got, want) {
		t.Errorf("rounds %v, want %v", got, want)
	}
	if got := steps(all["validation/accuracy"]); !slices.Equal(got, []uint64{2, 2}) {
		t.Errorf("validations %v", got)
	}
}

// What is no round of a peer, or no number to draw, is left out.
func TestNonsense(t *testing.T) {
	w, err := Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	huge := round(1, 1, 1e300, 0)
	w.all(t, &events.Event{}, round(0, 1, 1, 0), round(maxPeers+1, 1, 1, 0), round(1, 0, 1, 0), round(1, maxRound+1, 1, 0), huge, &events.Event{Event: "validation", Peer: 1, Round: 1})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(read(t, w.Path()))); !slices.Equal(got, []string{"cost/usd_per_round", "images_per_second", "round/seconds"}) {
		t.Error(got)
	}
}

// Others read the file while it is written: after seconds of events, or many.
func TestFlush(t *testing.T) {
	w, err := Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	w.all(t, round(1, 1, 1, 0))
	if got := read(t, w.Path()); len(got) != 0 {
		t.Error("written at once", got)
	}
	w.all(t, round(2, 1, 1, 5))
	if got := read(t, w.Path()); len(got["loss"]) != 1 {
		t.Error("not written after 5 s", got)
	}
	for n := uint64(2); n < 1000; n++ {
		w.all(t, round(1, n, 1, 5), round(2, n, 1, 5))
	}
	if got := read(t, w.Path()); len(got["loss"]) < 200 {
		t.Errorf("%d rounds written of 1000", len(got["loss"]))
	}
}

// Two starts in one second make two files, and a failed write is told.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	if has, err := Has(filepath.Join(dir, "none")); has || err != nil {
		t.Error(has, err)
	}
	if has, err := Has(dir); has || err != nil {
		t.Error(has, err)
	}
	a, err := Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	if has, err := Has(dir); !has || err != nil || a.Path() == b.Path() {
		t.Error(has, err, a.Path(), b.Path())
	}
	if !strings.HasPrefix(filepath.Base(a.Path()), "events.out.tfevents.") {
		t.Error(a.Path())
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	a.f.Close() // from now on no write succeeds
	if err := a.Add(round(1, 1, 1, 0)); err != nil {
		t.Error("nothing is written yet:", err)
	}
	if err := a.Add(round(1, 2, 1, 60)); !errors.Is(err, os.ErrClosed) {
		t.Error("a write failed:", err)
	}
	if err := a.Add(round(1, 3, 1, 60)); !errors.Is(err, os.ErrClosed) {
		t.Error("once failed:", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(file); err == nil {
		t.Error("a file is no folder")
	}
}
