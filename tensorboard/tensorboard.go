// Package tensorboard writes a run as event files, which TensorBoard shows.
//
// Create makes a file in a folder; give each event of the run to Writer.Add and
// call Close. A run that goes on later adds a file beside it. The scalars, by
// round: loss, validation/loss, validation/accuracy, round/seconds,
// cost/usd_per_round, images_per_second and, of each peer, peer/N/loss.
//
// A scalar over the peers is written once all whose averages the round contains
// have finished it, or 8 rounds later; who tells of it after that is left out.
// Of one tag the rounds ascend, except that a run which was resumed may go back:
// TensorBoard then shows the later values. What is added is in the file 5
// seconds of events later at most, and at Close. Scalars have the precision of
// float32.
package tensorboard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/spirt-ml/spirt/events"
)

const (
	prefix = "events.out.tfevents."

	flushBytes = 64 << 10
	flushAfter = 5 * time.Second // in the time of events
	maxPending = 8               // rounds that wait for peers
	maxPeers   = 256
	maxRound   = 1 << 53
)

// Writer writes one event file. It is not safe for concurrent use.
type Writer struct {
	f       *os.File
	buf     []byte // whole records
	err     error  // of the first write that failed
	flushed time.Time

	pending   []*pending // ascending by round
	written   uint64     // the last round that was written
	validated uint64     // likewise, of validations
}

// pending is a round that not all of its peers have told of.
type pending struct {
	round uint64
	at    time.Time
	peers []int // that have
	of    int   // how many there are
	sum   events.RoundSum
}

// Create makes a new event file in a folder, which it makes if need be. Its
// name is that of TensorFlow's core/util/events_writer.cc: time and host, and
// the process ID.
func Create(dir string) (*Writer, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("creating a TensorBoard folder: %w", err)
	}
	now := time.Now()
	name := fmt.Sprintf("%s%010d.%s.%d", prefix, now.Unix(), host(), os.Getpid())
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	for n := 1; errors.Is(err, fs.ErrExist) && n < 100; n++ {
		f, err = os.OpenFile(filepath.Join(dir, fmt.Sprintf("%s.%d", name, n)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("creating a TensorBoard file: %w", err)
	}
	w := &Writer{f: f}
	// What readers know the format by.
	e := protowire.AppendTag(appendTime(nil, now), eventFileVersion, protowire.BytesType)
	w.record(protowire.AppendString(e, "brain.Event:2"))
	if err := w.flush(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return w, nil
}

// Has says whether there are event files in a folder.
func Has(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), prefix) }), nil
}

// host is the name of this machine, as far as it is fit for a file's name.
func host() string {
	name, _ := os.Hostname()
	name = strings.Map(func(r rune) rune {
		if r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '-'
	}, name[:min(len(name), 64)])
	if name == "" {
		return "unknown"
	}
	return name
}

// Path returns the path of the file.
func (w *Writer) Path() string { return w.f.Name() }

// Add takes the next event of the run. After an error, which is that of a
// write, nothing more is written.
func (w *Writer) Add(e *events.Event) error {
	switch {
	case e.Event == "run": // what comes may be rounds that were there before
		w.settle(0)
		w.written, w.validated = 0, 0
	case e.Round == 0 || e.Round > maxRound || e.Peer < 1 || e.Peer > maxPeers:
	case e.Event == "round":
		if e.Loss != nil {
			w.scalar(e.Time, e.Round, "peer/"+strconv.Itoa(e.Peer)+"/loss", *e.Loss)
		}
		w.round(e)
	case e.Event == "validation" && e.Round > w.validated: // every peer tells the same
		w.validated = e.Round
		if e.Loss != nil {
			w.scalar(e.Time, e.Round, "validation/loss", *e.Loss)
		}
		if e.Accuracy != nil {
			w.scalar(e.Time, e.Round, "validation/accuracy", *e.Accuracy)
		}
	}
	if w.flushed.IsZero() {
		w.flushed = e.Time
	}
	if len(w.buf) >= flushBytes || e.Time.Sub(w.flushed) >= flushAfter {
		w.flushed = e.Time
		return w.flush()
	}
	return w.err
}

// round takes a round that a peer has finished.
func (w *Writer) round(e *events.Event) {
	if e.Round <= w.written {
		return
	}
	i, known := slices.BinarySearchFunc(w.pending, e.Round, func(p *pending, r uint64) int {
		switch {
		case p.round < r:
			return -1
		case p.round > r:
			return 1
		}
		return 0
	})
	if !known {
		w.pending = slices.Insert(w.pending, i, &pending{round: e.Round})
	}
	p := w.pending[i]
	if slices.Contains(p.peers, e.Peer) { // it has reorganised
		return
	}
	p.at, p.of = e.Time, max(p.of, len(e.Members))
	p.peers = append(p.peers, e.Peer)
	p.sum.Add(e)
	w.settle(maxPending)
}

// settle writes the first rounds, until one has to wait and there are no more
// than so many.
func (w *Writer) settle(most int) {
	for len(w.pending) > 0 && (len(w.pending) > most || len(w.pending[0].peers) >= w.pending[0].of) {
		p := w.pending[0]
		w.pending = slices.Delete(w.pending, 0, 1)
		w.written = p.round
		if loss, ok := p.sum.Loss(); ok {
			w.scalar(p.at, p.round, "loss", loss)
		}
		seconds := p.sum.Seconds()
		w.scalar(p.at, p.round, "round/seconds", seconds)
		w.scalar(p.at, p.round, "cost/usd_per_round", p.sum.Cost.Dollars())
		if seconds > 0 {
			w.scalar(p.at, p.round, "images_per_second", float64(p.sum.Samples)/seconds)
		}
	}
}

// Close writes what is left. It returns the first error of all.
func (w *Writer) Close() error {
	w.settle(0)
	return errors.Join(w.flush(), w.f.Close())
}

// flush writes the records so far.
func (w *Writer) flush() error {
	if w.err == nil && len(w.buf) > 0 {
		if _, err := w.f.Write(w.buf); err != nil {
			w.err = fmt.Errorf("writing a TensorBoard file: %w", err)
		}
	}
	w.buf = w.buf[:0]
	return w.err
}

// Fields of the messages Event (TensorFlow's core/util/event.proto), Summary and
// Summary.Value (core/framework/summary.proto).
const (
	eventWallTime    protowire.Number = 1 // double, seconds since 1970
	eventStep        protowire.Number = 2 // int64
	eventFileVersion protowire.Number = 3
	eventSummary     protowire.Number = 5
	summaryValue     protowire.Number = 1
	valueTag         protowire.Number = 1
	valueSimple      protowire.Number = 2 // float
)

func appendTime(e []byte, at time.Time) []byte {
	e = protowire.AppendTag(e, eventWallTime, protowire.Fixed64Type)
	return protowire.AppendFixed64(e, math.Float64bits(float64(at.UnixMicro())/1e6))
}

// scalar writes one value. TensorBoard draws no others than finite ones.
func (w *Writer) scalar(at time.Time, round uint64, tag string, value float64) {
	single := float32(value)
	if single-single != 0 {
		return
	}
	v := protowire.AppendTag(make([]byte, 0, 64), valueTag, protowire.BytesType)
	v = protowire.AppendString(v, tag)
	v = protowire.AppendTag(v, valueSimple, protowire.Fixed32Type)
	v = protowire.AppendFixed32(v, math.Float32bits(single))
	s := protowire.AppendTag(make([]byte, 0, 64), summaryValue, protowire.BytesType)
	s = protowire.AppendBytes(s, v)
	e := appendTime(make([]byte, 0, 96), at)
	e = protowire.AppendTag(e, eventStep, protowire.VarintType)
	e = protowire.AppendVarint(e, round)
	e = protowire.AppendTag(e, eventSummary, protowire.BytesType)
	w.record(protowire.AppendBytes(e, s))
}

// record frames a message as TensorFlow's core/lib/io/record_writer.cc does:
//
//	offset  size
//	0       8     n, length of the message, little-endian
//	8       4     checksum of these 8 bytes
//	12      n     the message
//	12+n    4     checksum of the message
func (w *Writer) record(message []byte) {
	at := len(w.buf)
	w.buf = binary.LittleEndian.AppendUint64(w.buf, uint64(len(message)))
	w.buf = binary.LittleEndian.AppendUint32(w.buf, checksum(w.buf[at:]))
	w.buf = append(w.buf, message...)
	w.buf = binary.LittleEndian.AppendUint32(w.buf, checksum(message))
}

// checksum is CRC-32C, turned and shifted as in TensorFlow's core/lib/hash/crc32c.h.
func checksum(b []byte) uint32 {
	c := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
	return (c>>15 | c<<17) + 0xa282ead8
}
