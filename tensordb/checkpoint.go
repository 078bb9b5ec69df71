package tensordb

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/tensor"
)

// The reasons why a checkpoint file cannot be used. FORMAT.md describes the
// file.
var (
	// ErrTorn: the file is shorter than it says.
	ErrTorn = errors.New("torn checkpoint")
	// ErrChecksum: the file is not what was written.
	ErrChecksum = errors.New("damaged checkpoint")
	// ErrFormatVersion: the file is whole, but of another format version.
	ErrFormatVersion = errors.New("checkpoint of another format version")
)

// ErrDiskFull: there is no room for a checkpoint. The ones before are intact.
var ErrDiskFull = errors.New("no space left")

const (
	checkpointMagic   = "\x89SPIRTC\n"
	checkpointVersion = 2
	checkpointHeader  = 64
	checkpointAlign   = 64
	checkpointSuffix  = ".ckpt"
	checkpointKept    = 2

	flagGradient = 1 // of a tensor: it can be computed again

	maxDirectory  = 64 << 20
	maxMetaString = 1 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checkpoint writes the tensors of keys, as they are at one moment, and meta to
// disk: to a temporary file, synced, renamed, with the folder synced after.
// When it returns nil the checkpoint survives a power cut. The two newest of
// each name are kept. The database can be used meanwhile.
func (db *DB) Checkpoint(name string, keys []string, meta map[string]string) error {
	if err := db.checkCheckpoint(name); err != nil {
		return err
	}
	for k, v := range meta {
		if len(k) > maxMetaString || len(v) > maxMetaString {
			return fmt.Errorf("checkpoint %q: %w: metadata %.64q has more than %d bytes", name, ErrOutOfRange, k, maxMetaString)
		}
	}
	keys = slices.Compact(slices.Sorted(slices.Values(keys)))
	entries, last, err := db.memory.entries(keys, false)
	if err != nil {
		return fmt.Errorf("checkpoint %q: %w", name, err)
	}
	return db.writeCheckpoint(name, &checkpoint{versions: last, meta: meta, entries: entries})
}

// metaSaved is when Save wrote a checkpoint.
const metaSaved = "saved"

// Save writes a checkpoint of all tensors but gradients, as they are at one
// moment. The database can be used meanwhile.
func (db *DB) Save(name string) error {
	if err := db.checkCheckpoint(name); err != nil {
		return err
	}
	entries, last, err := db.memory.entries(nil, true)
	if err != nil {
		return fmt.Errorf("checkpoint %q: %w", name, err)
	}
	meta := map[string]string{metaSaved: time.Now().UTC().Format(time.RFC3339)}
	return db.writeCheckpoint(name, &checkpoint{versions: last, meta: meta, entries: entries})
}

// entries pins the tensors of keys, which are sorted, as they are at one
// moment, or all but gradients. last is the version number given out last.
func (s *memspace) entries(keys []string, all bool) (list []checkpointEntry, last uint64, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, 0, ErrClosed
	}
	if all {
		for key, v := range s.tensors {
			if !v.meta.Gradient && s.at(key) != nil {
				keys = append(keys, key)
			}
		}
		slices.Sort(keys)
	}
	for _, key := range keys {
		v := s.at(key)
		if v == nil {
			(&checkpoint{entries: list}).release()
			return nil, 0, noKey(key)
		}
		list = append(list, checkpointEntry{
			key: key, dtype: v.meta.DType, shape: v.meta.Shape, gradient: v.meta.Gradient, step: v.meta.Step,
			expires: v.expires, data: v.blob.data, blob: v.blob.retain(),
		})
	}
	return list, s.last, nil
}

// writeCheckpoint writes c, whose blobs it gives back, as the newest of its
// name.
func (db *DB) writeCheckpoint(name string, c *checkpoint) error {
	defer c.release()
	for i := range c.entries {
		c.entries[i].hash = c.entries[i].blob.sum()
	}
	db.checkpointMu.Lock()
	defer db.checkpointMu.Unlock()
	db.removeTemporary()
	found, err := db.listCheckpoints(name)
	if err != nil {
		return fmt.Errorf("checkpoint %q: %w", name, err)
	}
	c.sequence = 1
	if len(found) > 0 {
		c.sequence = found[0].sequence + 1
	}
	path := db.path(fmt.Sprintf("%s-%016x%s", name, c.sequence, checkpointSuffix))
	if err := writeFileDurably(db.files, path, c.write); diskFull(err) {
		return fmt.Errorf("checkpoint %q: %w on the disk of %s: make room there; the checkpoint before is intact: %w", name, ErrDiskFull, db.config.Dir, err)
	} else if err != nil {
		return fmt.Errorf("checkpoint %q: %w", name, err)
	}
	for _, old := range found[min(len(found), checkpointKept-1):] {
		if err := db.files.remove(old.path); err != nil {
			db.log.Warn("an old checkpoint could not be removed", "file", old.path, "error", err)
		}
	}
	return nil
}

func (db *DB) path(name string) string { return filepath.Join(db.config.Dir, name) }

// checkpointName returns the name in that of a file without its suffix, empty
// if it is none of a checkpoint.
func checkpointName(stem string) string {
	i := len(stem) - 17
	if i < 1 || stem[i] != '-' || strings.Trim(stem[i+1:], "0123456789abcdef") != "" {
		return ""
	}
	return stem[:i]
}

// Checkpoints returns the names of which there are checkpoints on disk, valid
// or not, in ascending order.
func (db *DB) Checkpoints() ([]string, error) {
	files, err := db.files.list(db.config.Dir)
	if err != nil {
		return nil, fmt.Errorf("listing checkpoints: %w", err)
	}
	var names []string
	for _, file := range files {
		stem, ok := strings.CutSuffix(file, checkpointSuffix)
		if name := checkpointName(stem); ok && name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// RemoveCheckpoint removes all checkpoints of a name.
func (db *DB) RemoveCheckpoint(name string) error {
	if err := db.checkCheckpoint(name); err != nil {
		return err
	}
	db.checkpointMu.Lock()
	defer db.checkpointMu.Unlock()
	found, err := db.listCheckpoints(name)
	for _, f := range found {
		err = errors.Join(err, db.files.remove(f.path))
	}
	if err != nil {
		return fmt.Errorf("removing checkpoint %q: %w", name, err)
	}
	return nil
}

// Recover loads the newest valid checkpoint of this name, replacing the tensors
// it holds at one moment, and returns its metadata. Invalid ones are passed
// over with a warning in the log. ErrNoCheckpoint: there is none; if there are
// only invalid ones the error tells why each is.
func (db *DB) Recover(name string) (meta map[string]string, err error) {
	if err := db.checkCheckpoint(name); err != nil {
		return nil, err
	}
	found, err := db.listCheckpoints(name)
	if err != nil {
		return nil, fmt.Errorf("recovering %q: %w", name, err)
	}
	var reasons []error
	for _, f := range found {
		c, err := db.readCheckpointFile(f.path)
		if errors.Is(err, ErrMemory) {
			return nil, fmt.Errorf("recovering %q: %w", name, err)
		}
		if err != nil {
			db.log.Warn("a checkpoint cannot be used, trying the one before", "file", f.path, "error", err)
			reasons = append(reasons, fmt.Errorf("%s: %w", filepath.Base(f.path), err))
			continue
		}
		if err := db.adopt(c); err != nil {
			return nil, fmt.Errorf("recovering %q: %w", name, err)
		}
		attrs := []any{"file", f.path, "tensors", len(c.entries)}
		if saved, err := time.Parse(time.RFC3339, c.meta[metaSaved]); err == nil {
			attrs = append(attrs, "age", time.Since(saved).Round(time.Second))
		}
		db.log.Info("a checkpoint was recovered", attrs...)
		return c.meta, nil
	}
	if len(reasons) > 0 {
		return nil, fmt.Errorf("recovering %q: none of %d checkpoints can be used: %w", name, len(found), errors.Join(reasons...))
	}
	return nil, fmt.Errorf("recovering %q: %w of that name in %s", name, ErrNoCheckpoint, db.config.Dir)
}

func (db *DB) checkCheckpoint(name string) error {
	if db.config.Dir == "" {
		return fmt.Errorf("checkpoint %q: the database was opened without a folder for checkpoints", name)
	}
	if db.memory == nil {
		return fmt.Errorf("checkpoint %q: the tensors are not in this process's memory: whoever has them keeps them", name)
	}
	valid := len(name) > 0 && len(name) <= 64 && name[0] != '.'
	for _, c := range []byte(name) {
		valid = valid && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '.' || c == '-')
	}
	if !valid {
		return fmt.Errorf("%w: a checkpoint name has 1 to 64 letters, digits, dots, dashes and underscores, not %.80q", ErrOutOfRange, name)
	}
	return nil
}

// adopt makes the tensors of c current, all at one moment, but for those whose
// time is over.
func (db *DB) adopt(c *checkpoint) error {
	s := db.memory
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.release()
		return ErrClosed
	}
	s.last = max(s.last, c.versions)
	now := time.Now()
	for _, e := range c.entries {
		if !e.expires.IsZero() && !now.Before(e.expires) {
			e.blob.release()
			continue
		}
		s.putLocked(e.key, &version{blob: e.blob, meta: Meta{DType: e.dtype, Shape: e.shape, Step: e.step, Gradient: e.gradient}})
		if !e.expires.IsZero() {
			s.expireLocked(e.key, e.expires)
		}
		s.changed(e.key)
	}
	return nil
}

func (db *DB) readCheckpointFile(path string) (*checkpoint, error) {
	f, err := db.files.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.size()
	if err != nil {
		return nil, err
	}
	return readCheckpoint(f, size, &db.mem)
}

type checkpointFile struct {
	path     string
	sequence uint64
}

// listCheckpoints returns the files of a name, newest first.
func (db *DB) listCheckpoints(name string) ([]checkpointFile, error) {
	files, err := db.files.list(db.config.Dir)
	if err != nil {
		return nil, err
	}
	var found []checkpointFile
	for _, file := range files {
		stem, ok := strings.CutSuffix(file, checkpointSuffix)
		if !ok || checkpointName(stem) != name {
			continue
		}
		sequence, err := strconv.ParseUint(stem[len(name)+1:], 16, 63)
		if err != nil {
			continue
		}
		found = append(found, checkpointFile{db.path(file), sequence})
	}
	slices.SortFunc(found, func(a, b checkpointFile) int { return cmp.Compare(b.sequence, a.sequence) })
	return found, nil
}

// writeFileDurably makes path a file with what write writes: either the whole
// file is there, also after a power cut, or none.
func writeFileDurably(fs files, path string, write func(io.Writer) error) (err error) {
	temporary := path + ".tmp"
	f, err := fs.create(temporary)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			fs.remove(temporary)
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := fs.rename(temporary, path); err != nil {
		return err
	}
	return fs.syncDir(filepath.Dir(path))
}

// checkpoint is the content of a checkpoint file.
type checkpoint struct {
	sequence uint64 // number of the checkpoint among those of its name
	versions uint64 // the version number given out last
	meta     map[string]string
	entries  []checkpointEntry // sorted by key
}

type checkpointEntry struct {
	key      string
	dtype    tensor.DType
	shape    []int
	gradient bool
	step     uint64
	expires  time.Time     // zero: never
	hash     treehash.Hash // of the data
	offset   int64         // in the file
	data     []byte
	blob     *blob // holds data
}

func (c *checkpoint) release() {
	for _, e := range c.entries {
		if e.blob != nil {
			e.blob.release()
		}
	}
}

// layout sets the offsets of the data after a directory of the given length,
// and returns the length of the file.
func (c *checkpoint) layout(directory int) int64 {
	end := int64(checkpointHeader + directory)
	for i := range c.entries {
		c.entries[i].offset = align(end)
		end = c.entries[i].offset + int64(len(c.entries[i].data))
	}
	return end
}

func align(n int64) int64 { return (n + checkpointAlign - 1) &^ (checkpointAlign - 1) }

// write writes the file front to back.
func (c *checkpoint) write(w io.Writer) error {
	size := c.layout(len(c.directory())) // the directory's length is known before its offsets are
	directory := c.directory()
	if len(directory) > maxDirectory {
		return fmt.Errorf("%w: a directory of %d bytes, at most %d are allowed", ErrOutOfRange, len(directory), maxDirectory)
	}
	h := make([]byte, 0, checkpointHeader+len(directory))
	h = append(h, checkpointMagic...)
	h = binary.LittleEndian.AppendUint32(h, checkpointVersion)
	h = binary.LittleEndian.AppendUint32(h, uint32(len(directory)))
	h = binary.LittleEndian.AppendUint64(h, uint64(size))
	h = binary.LittleEndian.AppendUint64(h, c.sequence)
	h = binary.LittleEndian.AppendUint64(h, c.versions)
	h = binary.LittleEndian.AppendUint32(h, uint32(len(c.entries)))
	h = binary.LittleEndian.AppendUint32(h, uint32(len(c.meta)))
	h = binary.LittleEndian.AppendUint32(h, crc32.Checksum(directory, castagnoli))
	h = append(h, make([]byte, checkpointHeader-4-len(h))...)
	h = binary.LittleEndian.AppendUint32(h, crc32.Checksum(h, castagnoli))
	if _, err := w.Write(append(h, directory...)); err != nil {
		return err
	}
	at := int64(checkpointHeader + len(directory))
	var zeros [checkpointAlign]byte
	for _, e := range c.entries {
		if _, err := w.Write(zeros[:e.offset-at]); err != nil {
			return err
		}
		if _, err := w.Write(e.data); err != nil {
			return err
		}
		at = e.offset + int64(len(e.data))
	}
	return nil
}

// directory returns the bytes between the header and the data.
func (c *checkpoint) directory() []byte {
	var b []byte
	for _, k := range slices.Sorted(maps.Keys(c.meta)) {
		for _, s := range []string{k, c.meta[k]} {
			b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
			b = append(b, s...)
		}
	}
	for _, e := range c.entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(e.key)))
		b = append(b, e.key...)
		flags := byte(0)
		if e.gradient {
			flags = flagGradient
		}
		b = append(b, byte(e.dtype), byte(len(e.shape)), flags)
		for _, d := range e.shape {
			b = binary.LittleEndian.AppendUint64(b, uint64(d))
		}
		b = binary.LittleEndian.AppendUint64(b, e.step)
		b = binary.LittleEndian.AppendUint64(b, unixMilli(e.expires))
		b = binary.LittleEndian.AppendUint64(b, uint64(e.offset))
		b = binary.LittleEndian.AppendUint64(b, uint64(len(e.data)))
		b = append(b, e.hash[:]...)
	}
	return b
}

// unixMilli is the expiry as in the file, 0 for never.
func unixMilli(at time.Time) uint64 {
	if at.IsZero() {
		return 0
	}
	return uint64(max(at.UnixMilli(), 1))
}

// readCheckpoint reads a checkpoint file of size bytes with memory of mem. No
// more is allocated than the file has bytes. Errors wrap ErrTorn, ErrChecksum
// or ErrFormatVersion, or come from r or mem.
func readCheckpoint(r io.ReaderAt, size int64, mem *memory) (*checkpoint, error) {
	if size < checkpointHeader {
		return nil, fmt.Errorf("%w: it has %d bytes, a header has %d", ErrTorn, size, checkpointHeader)
	}
	h := make([]byte, checkpointHeader)
	if err := readAt(r, h, 0); err != nil {
		return nil, err
	}
	if string(h[:8]) != checkpointMagic {
		return nil, fmt.Errorf("%w: it does not start as a checkpoint does", ErrChecksum)
	}
	if crc32.Checksum(h[:checkpointHeader-4], castagnoli) != binary.LittleEndian.Uint32(h[checkpointHeader-4:]) {
		return nil, fmt.Errorf("%w: the header's checksum is wrong", ErrChecksum)
	}
	if v := binary.LittleEndian.Uint32(h[8:]); v != checkpointVersion {
		return nil, fmt.Errorf("%w: %d, this program reads version %d", ErrFormatVersion, v, checkpointVersion)
	}
	length := int64(binary.LittleEndian.Uint32(h[12:]))
	stated := binary.LittleEndian.Uint64(h[16:])
	switch {
	case uint64(size) < stated:
		return nil, fmt.Errorf("%w: it has %d bytes of %d", ErrTorn, size, stated)
	case uint64(size) > stated:
		return nil, fmt.Errorf("%w: it has %d bytes, not %d", ErrChecksum, size, stated)
	case length > maxDirectory || length > size-checkpointHeader:
		return nil, fmt.Errorf("%w: a directory of %d bytes in a file of %d", ErrChecksum, length, size)
	}
	directory := make([]byte, length)
	if err := readAt(r, directory, checkpointHeader); err != nil {
		return nil, err
	}
	if crc32.Checksum(directory, castagnoli) != binary.LittleEndian.Uint32(h[48:]) {
		return nil, fmt.Errorf("%w: the directory's checksum is wrong", ErrChecksum)
	}
	c := &checkpoint{
		sequence: binary.LittleEndian.Uint64(h[24:]),
		versions: binary.LittleEndian.Uint64(h[32:]),
		meta:     make(map[string]string),
	}
	lengths, err := c.parseDirectory(directory, binary.LittleEndian.Uint32(h[40:]), binary.LittleEndian.Uint32(h[44:]))
	if err != nil {
		return nil, fmt.Errorf("%w: directory: %w", ErrChecksum, err)
	}
	if err := c.readData(r, int(length), size, lengths, mem); err != nil {
		c.release()
		return nil, err
	}
	return c, nil
}

// parseDirectory reads what directory wrote, and returns the length of each
// entry's data. Only the one way to write a checkpoint is accepted.
func (c *checkpoint) parseDirectory(b []byte, entries, metas uint32) ([]int, error) {
	short := false
	take := func(n uint64) []byte {
		if n > uint64(len(b)) {
			short, b = true, nil
			return make([]byte, 8) // a zero of any width
		}
		p := b[:n]
		b = b[n:]
		return p
	}
	number := func() uint64 { return binary.LittleEndian.Uint64(take(8)) }
	text := func() string { return string(take(uint64(binary.LittleEndian.Uint32(take(4))))) }
	last := ""
	for i := range metas {
		k, v := text(), text()
		if short || i > 0 && k <= last {
			return nil, fmt.Errorf("metadata entry %d is cut off or out of order", i)
		}
		c.meta[k], last = v, k
	}
	var lengths []int
	last = ""
	for i := range entries {
		e := checkpointEntry{key: string(take(uint64(binary.LittleEndian.Uint16(take(2)))))}
		e.dtype = tensor.DType(take(1)[0])
		rank := int(take(1)[0])
		flags := take(1)[0]
		if short || e.key <= last || len(e.key) > maxKey || rank > tensor.MaxRank || flags&^flagGradient != 0 {
			return nil, fmt.Errorf("tensor %d: key %.64q, rank %d or flags %#x is cut off, out of range or out of order", i, e.key, rank, flags)
		}
		last, e.gradient = e.key, flags&flagGradient != 0
		e.shape = make([]int, rank)
		for j := range e.shape {
			d := number()
			if d > math.MaxInt {
				return nil, fmt.Errorf("tensor %.64q: dimension %d is %d", e.key, j, d)
			}
			e.shape[j] = int(d)
		}
		e.step = number()
		switch at := number(); {
		case at > math.MaxInt64:
			return nil, fmt.Errorf("tensor %.64q: it expires at %d", e.key, at)
		case at > 0:
			e.expires = time.UnixMilli(int64(at))
		}
		e.offset = int64(number())
		length := number()
		copy(e.hash[:], take(uint64(len(e.hash))))
		want, err := tensor.DataLen(e.dtype, e.shape)
		if err != nil {
			return nil, fmt.Errorf("tensor %.64q: %w", e.key, err)
		}
		if short || length != uint64(want) {
			return nil, fmt.Errorf("tensor %.64q is cut off, or has %d bytes and not %d", e.key, length, want)
		}
		c.entries = append(c.entries, e)
		lengths = append(lengths, want)
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("%d bytes too many", len(b))
	}
	return lengths, nil
}

// readData reads and checks the tensors' bytes and the zeros between them.
func (c *checkpoint) readData(r io.ReaderAt, directory int, size int64, lengths []int, mem *memory) error {
	end := int64(checkpointHeader + directory)
	var gap, zeros [checkpointAlign]byte
	for i := range c.entries {
		e := &c.entries[i]
		if e.offset != align(end) || int64(lengths[i]) > size-e.offset {
			return fmt.Errorf("%w: tensor %.64q does not lie where it should", ErrChecksum, e.key)
		}
		pad := gap[:e.offset-end]
		if err := readAt(r, pad, end); err != nil {
			return err
		}
		if !bytes.Equal(pad, zeros[:len(pad)]) {
			return fmt.Errorf("%w: the bytes before tensor %.64q are not zero", ErrChecksum, e.key)
		}
		b, err := mem.alloc(lengths[i])
		if err != nil {
			return err
		}
		e.blob, e.data = b, b.data
		if err := readAt(r, e.data, e.offset); err != nil {
			return err
		}
		if b.sum() != e.hash {
			return fmt.Errorf("%w: the bytes of tensor %.64q, from offset %d, do not have their hash", ErrChecksum, e.key, e.offset)
		}
		end = e.offset + int64(lengths[i])
	}
	if end != size {
		return fmt.Errorf("%w: %d bytes after the last tensor", ErrChecksum, size-end)
	}
	return nil
}

// readAt fills p. A file that ends early was cut off while it was read.
func readAt(r io.ReaderAt, p []byte, offset int64) error {
	n, err := r.ReadAt(p, offset)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		return fmt.Errorf("%w: it ends at offset %d", ErrTorn, offset+int64(n))
	}
	return err
}
