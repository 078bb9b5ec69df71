package p2p

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// Packing says when chunks travel packed. Hashes are always over the bytes
// themselves, so that nobody needs to know how a body travelled.
type Packing uint8

const (
	// PackAuto packs where it saves time: on connections to other machines over
	// which bodies come at less than 32 MB/s.
	PackAuto Packing = iota
	PackAlways
	PackNever
)

// packBelow is the rate of a connection, in bytes a second, below which chunks
// are asked for packed. Packing saves a fifth of a chunk of 256 KiB and takes
// about 0.7 ms of one core, which a link of 75 MB/s makes up for; slow machines
// on slow links are slower by more than half of that.
const packBelow = 32 << 20

// A packed chunk is its bytes in four planes, byte i in plane i%4: the bytes of
// floats that hold sign and exponent compress well, those of the mantissa
// hardly. Each plane is its length, uint32, and a zstd frame; a plane that
// does not get smaller is there as it is, with its own length.
const planes = 4

// planeSize is the number of bytes in plane k of n bytes.
func planeSize(n, k int) int { return (n + planes - 1 - k) / planes }

var newEncoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(treehash.ChunkSize/planes),
		zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true), zstd.WithSingleSegment(true))
	if err != nil {
		panic("p2p: " + err.Error()) // an option that is none
	}
	return e
})

var newDecoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(treehash.ChunkSize), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic("p2p: " + err.Error())
	}
	return d
})

// pack appends the packed chunk to dst, or reports that it is not smaller.
func pack(dst, chunk []byte) ([]byte, bool) {
	start := len(dst)
	plane := make([]byte, planeSize(len(chunk), 0))
	for k := range planes {
		plane = plane[:planeSize(len(chunk), k)]
		for i := range plane {
			plane[i] = chunk[i*planes+k]
		}
		head := len(dst)
		dst = newEncoder().EncodeAll(plane, append(dst, 0, 0, 0, 0))
		if len(dst)-head-4 >= len(plane) {
			dst = append(dst[:head+4], plane...)
		}
		binary.LittleEndian.PutUint32(dst[head:], uint32(len(dst)-head-4))
	}
	return dst, len(dst)-start < len(chunk)
}

var errPacked = errors.New("not a packed chunk")

// unpack fills chunk from packed bytes that must hold exactly that. It needs
// no more memory than the chunk.
func unpack(chunk, packed []byte) error {
	buf := make([]byte, planeSize(len(chunk), 0))
	for k := range planes {
		n := planeSize(len(chunk), k)
		if len(packed) < 4 || uint64(binary.LittleEndian.Uint32(packed)) > uint64(min(n, len(packed)-4)) {
			return fmt.Errorf("plane %d of %d bytes: %w", k, n, errPacked)
		}
		end := 4 + int(binary.LittleEndian.Uint32(packed))
		plane := packed[4:end]
		if len(plane) < n {
			// The capacity bounds what is decoded.
			var err error
			if plane, err = newDecoder().DecodeAll(plane, buf[:0:n]); err != nil || len(plane) != n {
				return fmt.Errorf("plane %d of %d bytes: %w", k, n, errors.Join(errPacked, err))
			}
		}
		packed = packed[end:]
		for i, b := range plane {
			chunk[i*planes+k] = b
		}
	}
	if len(packed) != 0 {
		return fmt.Errorf("%d bytes after it: %w", len(packed), errPacked)
	}
	return nil
}
