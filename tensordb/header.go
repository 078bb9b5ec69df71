package tensordb

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"

	"github.com/spirt-ml/spirt/tensor"
)

// HeaderLen is the bytes of the header that a tensor has where it lies as a
// string in Redis; FORMAT.md has its fields. With it the data of a large string
// starts at a multiple of 64 bytes.
const HeaderLen = 119

const (
	headerMagic    = "SPT1"
	headerGradient = 1 << 0
	headerSum      = HeaderLen - 4
)

// AppendHeader appends the header of a tensor.
func AppendHeader(b []byte, m *Meta) []byte {
	start := len(b)
	flags := byte(0)
	if m.Gradient {
		flags |= headerGradient
	}
	b = append(b, headerMagic...)
	b = append(b, byte(m.DType), byte(len(m.Shape)), flags, 0)
	b = binary.LittleEndian.AppendUint64(b, m.Version)
	b = binary.LittleEndian.AppendUint64(b, m.Step)
	for i := range tensor.MaxRank {
		dim := uint64(0)
		if i < len(m.Shape) {
			dim = uint64(m.Shape[i])
		}
		b = binary.LittleEndian.AppendUint64(b, dim)
	}
	b = append(b, make([]byte, start+headerSum-len(b))...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// ReadHeader reads the header of a string and checks that it has the bytes
// that the header says. Its errors wrap ErrWrongType.
func ReadHeader(b []byte) (m Meta, err error) {
	if len(b) < HeaderLen || string(b[:4]) != headerMagic {
		return m, fmt.Errorf("%w: the string is not a tensor", ErrWrongType)
	}
	if crc32.Checksum(b[:headerSum], castagnoli) != binary.LittleEndian.Uint32(b[headerSum:]) {
		return m, fmt.Errorf("%w: the string's header is damaged", ErrWrongType)
	}
	m.DType, m.Gradient = tensor.DType(b[4]), b[6]&headerGradient != 0
	rank := int(b[5])
	if rank > tensor.MaxRank || b[6]&^headerGradient != 0 || b[7] != 0 {
		return m, fmt.Errorf("%w: the string's header is not of this version", ErrWrongType)
	}
	m.Version, m.Step = binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])
	m.Shape = make([]int, rank)
	for i := range m.Shape {
		dim := binary.LittleEndian.Uint64(b[24+8*i:])
		if dim > math.MaxInt {
			return m, fmt.Errorf("%w: dimension %d of the string is %d", ErrWrongType, i, dim)
		}
		m.Shape[i] = int(dim)
	}
	want, err := tensor.DataLen(m.DType, m.Shape)
	if err != nil {
		return m, fmt.Errorf("%w: %w", ErrWrongType, err)
	}
	if len(b)-HeaderLen != want {
		return m, fmt.Errorf("%w: the string has %d bytes of a %v tensor of shape %v, which has %d", ErrWrongType, len(b)-HeaderLen, m.DType, m.Shape, want)
	}
	return m, nil
}

// HeaderVersion returns the version in a header that ReadHeader has read.
func HeaderVersion(b []byte) uint64 { return binary.LittleEndian.Uint64(b[8:]) }
