package dataset

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// encode makes an IDX file of bytes.
func encode[N int | uint32](dims []N, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x0800|uint32(len(dims)))
	for _, d := range dims {
		b = binary.BigEndian.AppendUint32(b, uint32(d))
	}
	return append(b, data...)
}

func pack(data []byte) []byte {
	var b bytes.Buffer
	z, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
	z.Write(data)
	z.Close()
	return b.Bytes()
}

func read(file []byte, rank int) (*idx, error) {
	return readIDX(bytes.NewReader(file), int64(len(file)), "f", rank)
}

func TestReadIDXRefuses(t *testing.T) {
	good := encode([]int{2, 3, 3}, make([]byte, 18))
	packed := pack(good)
	noise := make([]byte, 3000) // does not compress, so that half of the file holds half of it
	for i := range noise {
		noise[i] = byte(i*i>>3 ^ i*7)
	}
	long := pack(encode([]int{3000}, noise))
	flipped := slices.Clone(packed)
	flipped[len(flipped)-5] ^= 1 // in the checksum

	for name, c := range map[string]struct {
		file []byte
		rank int
		want string
	}{
		"empty":               {nil, 3, "f: truncated at byte 0, in its header of 16 bytes; get the file again: unexpected EOF"},
		"half a header":       {good[:9], 3, "f: truncated at byte 9, in its header of 16 bytes"},
		"no data":             {good[:16], 3, "f: truncated at byte 16, its header promises 34 bytes"},
		"one byte short":      {good[:33], 3, "f: truncated at byte 33, its header promises 34 bytes"},
		"one byte more":       {append(slices.Clone(good), 0), 3, "f: goes on after byte 34, though its header promises 34 bytes"},
		"packed, more":        {pack(append(slices.Clone(good), 0)), 3, "f: goes on after byte 34 of the unpacked data"},
		"labels for images":   {encode([]int{20}, make([]byte, 20)), 3, "f: magic 0x00000801 at byte 0 is not 0x00000803: not an IDX file of bytes with three dimensions (images)"},
		"images for labels":   {good, 1, "magic 0x00000803 at byte 0 is not 0x00000801"},
		"floats":              {append([]byte{0, 0, 0x0d, 3}, good[4:]...), 3, "magic 0x00000d03"},
		"text":                {[]byte("<!DOCTYPE html> not found"), 3, "magic 0x3c21444f"},
		"packed text":         {pack([]byte("<!DOCTYPE html> not found")), 3, "magic 0x3c21444f at byte 0 of the unpacked data"},
		"no image":            {encode([]int{0, 3, 3}, nil), 3, "f: size 0 at byte 4 of the header is not from 1"},
		"no width":            {encode([]int{2, 3, 0}, nil), 3, "size 0 at byte 12 of the header is not from 1 to 4096"},
		"absurd height":       {encode([]uint32{2, 1 << 31, 3}, nil), 3, "size 2147483648 at byte 8 of the header is not from 1 to 4096"},
		"absurd count":        {encode([]uint32{1<<32 - 1, 1, 1}, nil), 3, "size 4294967295 at byte 4"},
		"absurd product":      {encode([]uint32{1 << 30, 4096, 4096}, nil), 3, "18014398509481984 pixels or labels are more than the 1073741824 allowed"},
		"promise too large":   {encode([]int{1 << 20, 32, 32}, make([]byte, 50)), 3, "f: truncated at byte 66, its header promises 1073741840 bytes"},
		"packed, too large":   {pack(encode([]int{1 << 20, 32, 32}, make([]byte, 50))), 3, "truncated: its header promises 1073741840 bytes, more than"},
		"packed, no data":     {pack(good[:20]), 3, "f: truncated at byte 20 of the unpacked data, its header promises 34 bytes"},
		"gzip header":         {packed[:5], 3, "f: reading its gzip header: unexpected EOF"},
		"packed, cut in data": {long[:len(long)/2], 1, "of the unpacked data, its header promises 3008 bytes; get the file again: unexpected EOF"},
		"packed, cut at end":  {packed[:len(packed)-3], 3, "f: truncated at byte 34 of the unpacked data"},
		"packed, flipped bit": {flipped, 3, "f: damaged at byte 34 of the unpacked data, its header promises 34 bytes: gzip: invalid checksum"},
	} {
		got, err := read(c.file, c.rank)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v %v\nwant %s", name, got, err, c.want)
		}
	}
}

// A gzip bomb is read no further than its header promises, and a header that
// promises too much does not make the reader allocate.
func TestReadIDXBounded(t *testing.T) {
	zeros := make([]byte, 4<<20)
	files := [][]byte{
		pack(append(encode([]int{1, 1, 1}, []byte{0}), zeros...)),
		pack(encode([]int{1 << 20, 32, 32}, nil)),
		encode([]int{1 << 20, 32, 32}, nil),
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i, f := range files {
		if _, err := read(f, 3); err == nil {
			t.Errorf("file %d was taken", i)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("allocated %d bytes", n)
	}
}

func FuzzReadIDX(f *testing.F) {
	for _, file := range [][]byte{
		encode([]int{2, 2, 2}, make([]byte, 8)),
		encode([]int{5}, []byte{1, 2, 3, 4, 5}),
		encode([]uint32{1 << 30, 4096, 4096}, nil),
		encode([]int{3, 3, 3}, make([]byte, 26)),
	} {
		f.Add(file, true)
		f.Add(pack(file), true)
		f.Add(pack(file), false)
		f.Add(file[:len(file)/2], false)
	}
	f.Fuzz(func(t *testing.T, file []byte, images bool) {
		rank := 1
		if images {
			rank = 3
		}
		got, err := read(file, rank)
		if err != nil {
			if got != nil {
				t.Error("data and an error")
			}
			return
		}
		// What was taken means the same when it is written and read again.
		again, err := read(encode(got.dims, got.data), rank)
		if err != nil || !slices.Equal(again.dims, got.dims) || !bytes.Equal(again.data, got.data) {
			t.Errorf("%v of %v became %v, %v", got.dims, file, again, err)
		}
	})
}
