package dataset

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// MaxBytes bounds the unpacked data of one IDX file.
const MaxBytes = 1 << 30

const (
	maxSide = 4096 // pixels of one side of an image
	// maxRatio is how many bytes one byte of deflate can become at most, so
	// that a small file cannot make us allocate what its header claims.
	maxRatio = 1032
)

// idx is one IDX file: big-endian magic 0x000008RR for unsigned bytes of rank
// RR, then RR sizes of four bytes, then the bytes.
type idx struct {
	name string
	dims []int
	data []byte
}

// readFile reads one IDX file of a folder.
func readFile(dir fs.FS, name string, rank int) (*idx, error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	return readIDX(f, info.Size(), name, rank)
}

// readIDX reads an IDX file of size bytes, plain or gzipped, whichever its
// first two bytes say. It never allocates more than MaxBytes, nor more than
// size bytes can hold.
func readIDX(r io.Reader, size int64, name string, rank int) (*idx, error) {
	in := bufio.NewReader(r)
	holds, where := size, ""
	if start, _ := in.Peek(2); bytes.Equal(start, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("%s: reading its gzip header: %w", name, unexpected(err))
		}
		in = bufio.NewReader(z)
		holds, where = min(size, MaxBytes)*maxRatio, " of the unpacked data"
	}

	head := make([]byte, 4+4*rank)
	if n, err := io.ReadFull(in, head); err != nil {
		return nil, broken(name, int64(n), where, fmt.Sprintf("in its header of %d bytes", len(head)), err)
	}
	if magic, want := binary.BigEndian.Uint32(head), 0x0800|uint32(rank); magic != want {
		return nil, fmt.Errorf("%s: magic 0x%08x at byte 0%s is not 0x%08x: not an IDX file of bytes with %s",
			name, magic, where, want, map[int]string{1: "one dimension (labels)", 3: "three dimensions (images)"}[rank])
	}
	dims, total, err := sizes(head[4:])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	end := int64(len(head)) + total
	promise := fmt.Sprintf("its header promises %d bytes", end)
	if holds < end {
		if where != "" {
			return nil, fmt.Errorf("%s: truncated: %s, more than %d packed bytes can hold; get the file again", name, promise, size)
		}
		return nil, broken(name, holds, where, promise, io.ErrUnexpectedEOF)
	}
	data := make([]byte, total)
	if n, err := io.ReadFull(in, data); err != nil {
		return nil, broken(name, int64(len(head)+n), where, promise, err)
	}
	// One more read proves the end, and makes gzip check its checksum.
	switch _, err := in.ReadByte(); {
	case err == nil:
		return nil, fmt.Errorf("%s: goes on after byte %d%s, though %s", name, end, where, promise)
	case !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return nil, broken(name, end, where, promise, err)
	}
	return &idx{name, dims, data}, nil
}

// sizes reads the dimensions and bounds them and their product.
func sizes(b []byte) (dims []int, total int64, err error) {
	total = 1
	for i := 0; i < len(b); i += 4 {
		n := int64(binary.BigEndian.Uint32(b[i:]))
		limit := int64(MaxBytes)
		if i > 0 {
			limit = maxSide
		}
		if n < 1 || n > limit {
			return nil, 0, fmt.Errorf("size %d at byte %d of the header is not from 1 to %d", n, 4+i, limit)
		}
		dims = append(dims, int(n))
		total *= n // at most 2^30 * 2^12 * 2^12
	}
	if total > MaxBytes {
		return nil, 0, fmt.Errorf("%d pixels or labels are more than the %d allowed", total, MaxBytes)
	}
	return dims, total, nil
}

// broken names the byte where a file ends or stops making sense.
func broken(name string, at int64, where, promise string, err error) error {
	err = unexpected(err)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%s: truncated at byte %d%s, %s; get the file again: %w", name, at, where, promise, err)
	}
	return fmt.Errorf("%s: damaged at byte %d%s, %s: %w", name, at, where, promise, err)
}

// unexpected turns the end of the input into the error that it is here.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
