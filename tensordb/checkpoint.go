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
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

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

const (
	checkpointMagic   = "\x89SPIRTC\n"
	checkpointVersion = 1
	checkpointHeader  = 64
	checkpointAlign   = 64
	checkpointSuffix  = ".ckpt"
	checkpointKept    = 2

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
	refs, err := db.space.Get(keys...)
	if err != nil {
		return fmt.Errorf("checkpoint %q: %w", name, err)
	}
	defer releaseAll(refs)

	db.checkpointMu.Lock()
	defer db.checkpointMu.Unlock()
	found, err := listCheckpoints(db.config.Dir, name)
	if err != nil {
		return fmt.Errorf("checkpoint %q: %w", name, err)
	}
	c := checkpoint{sequence: 1, versions: db.Stats().LastVersion, meta: meta}
	if len(found) > 0 {
		c.sequence = found[0].sequence + 1
	}
	for i, r := range refs {
		c.entries = append(c.entries, checkpointEntry{
			key: keys[i], dtype: r.meta.DType, shape: r.meta.Shape, step: r.meta.Step, hash: r.Hash(), data: r.data,
		})
	}
	path := filepath.Join(db.config.Dir, fmt.Sprintf("%s-%016x%s", name, c.sequence, checkpointSuffix))
	if err := writeFileDurably(path, c.write); err != nil {
		return fmt.Errorf("checkpoint %q: %w", name, err)
	}
	for _, old := range found[min(len(found), checkpointKept-1):] {
		if err := os.Remove(old.path); err != nil {
			db.log.Warn("an old checkpoint could not be removed", "file", old.path, "error", err)
		}
	}
	return nil
}

// Checkpoints returns the names of which there are checkpoints on disk, valid
// or not, in ascending order.
func (db *DB) Checkpoints() ([]string, error) {
	files, err := os.ReadDir(db.config.Dir)
	if err != nil {
		return nil, fmt.Errorf("listing checkpoints: %w", err)
	}
	var names []string
	for _, f := range files {
		stem, ok := strings.CutSuffix(f.Name(), checkpointSuffix)
		if i := len(stem) - 17; ok && i > 0 && stem[i] == '-' {
			names = append(names, stem[:i])
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
	found, err := listCheckpoints(db.config.Dir, name)
	for _, f := range found {
		err = errors.Join(err, os.Remove(f.path))
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
	found, err := listCheckpoints(db.config.Dir, name)
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
		return c.meta, db.adopt(c)
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
	valid := len(name) > 0 && len(name) <= 64 && name[0] != '.'
	for _, c := range []byte(name) {
		valid = valid && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '.' || c == '-')
	}
	if !valid {
		return fmt.Errorf("%w: a checkpoint name has 1 to 64 letters, digits, dots, dashes and underscores, not %.80q", ErrOutOfRange, name)
	}
	return nil
}

// adopt makes the tensors of c current, all at one moment.
func (db *DB) adopt(c *checkpoint) error {
	s := db.memory
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.release()
		return ErrClosed
	}
	s.last = max(s.last, c.versions)
	for _, e := range c.entries {
		s.putLocked(e.key, &version{blob: e.blob, meta: Meta{DType: e.dtype, Shape: e.shape, Step: e.step}})
		s.changed(e.key)
	}
	return nil
}

func (db *DB) readCheckpointFile(path string) (*checkpoint, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return readCheckpoint(f, info.Size(), &db.mem)
}

type checkpointFile struct {
	path     string
	sequence uint64
}

// listCheckpoints returns the files of a name, newest first.
func listCheckpoints(dir, name string) ([]checkpointFile, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []checkpointFile
	for _, f := range files {
		digits, ok := strings.CutSuffix(f.Name(), checkpointSuffix)
		if !ok {
			continue
		}
		if digits, ok = strings.CutPrefix(digits, name+"-"); !ok || len(digits) != 16 {
			continue
		}
		sequence, err := strconv.ParseUint(digits, 16, 63)
		if err != nil {
			continue
		}
		found = append(found, checkpointFile{filepath.Join(dir, f.Name()), sequence})
	}
	slices.SortFunc(found, func(a, b checkpointFile) int { return cmp.Compare(b.sequence, a.sequence) })
	return found, nil
}

// writeFileDurably makes path a file with what write writes: either the whole
// file is there, also after a power cut, or none.
func writeFileDurably(path string, write func(io.Writer) error) (err error) {
	temporary := path + ".tmp"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(temporary)
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
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// checkpoint is the content of a checkpoint file.
type checkpoint struct {
	sequence uint64 // number of the checkpoint among those of its name
	versions uint64 // the version number given out last
	meta     map[string]string
	entries  []checkpointEntry // sorted by key
}

type checkpointEntry struct {
	key    string
	dtype  tensor.DType
	shape  []int
	step   uint64
	hash   treehash.Hash // of the data
	offset int64         // in the file
	data   []byte
	blob   *blob // holds data, of an entry that was read
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
		b = append(b, byte(e.dtype), byte(len(e.shape)))
		for _, d := range e.shape {
			b = binary.LittleEndian.AppendUint64(b, uint64(d))
		}
		b = binary.LittleEndian.AppendUint64(b, e.step)
		b = binary.LittleEndian.AppendUint64(b, uint64(e.offset))
		b = binary.LittleEndian.AppendUint64(b, uint64(len(e.data)))
		b = append(b, e.hash[:]...)
	}
	return b
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
		if short || e.key <= last || len(e.key) > maxKey || rank > tensor.MaxRank {
			return nil, fmt.Errorf("tensor %d: key %.64q or rank %d is cut off, out of range or out of order", i, e.key, rank)
		}
		last = e.key
		e.shape = make([]int, rank)
		for j := range e.shape {
			d := number()
			if d > math.MaxInt {
				return nil, fmt.Errorf("tensor %.64q: dimension %d is %d", e.key, j, d)
			}
			e.shape[j] = int(d)
		}
		e.step = number()
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

// Save writes a checkpoint of all tensors but gradients.
func (db *DB) Save(name string) error {
	var keys []string
	for _, key := range db.Keys("") {
		if m, err := db.Stat(key); err == nil && !m.Gradient {
			keys = append(keys, key)
		}
	}
	return db.Checkpoint(name, keys, nil)
}
