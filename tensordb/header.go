package tensordb

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/spirt-ml/spirt/tensor"
)

// HeaderLen is the length of what stands before the bytes of a tensor in a
// Redis string. Redis' own header of a long string has 9 bytes, so the data of
// large tensors start at a multiple of 64.
const HeaderLen = 119

const (
	headerMagic    = "SPT1"
	headerGradient = 1
	headerShape    = 24
	headerReserved = headerShape + 8*tensor.MaxRank
	headerSum      = HeaderLen - 4
)

// EncodeHeader writes the header of a tensor, as FORMAT.md has it, to the
// start of dst.
func EncodeHeader(dst []byte, m Meta) {
	h := dst[:HeaderLen]
	clear(h)
	copy(h, headerMagic)
	h[4], h[5] = byte(m.DType), byte(len(m.Shape))
	if m.Gradient {
		h[6] = headerGradient
	}
	binary.LittleEndian.PutUint64(h[8:], m.Version)
	binary.LittleEndian.PutUint64(h[16:], m.Step)
	for i, d := range m.Shape {
		binary.LittleEndian.PutUint64(h[headerShape+8*i:], uint64(d))
	}
	binary.LittleEndian.PutUint32(h[headerSum:], crc32.Checksum(h[:headerSum], castagnoli))
}

// DecodeHeader reads the header of a tensor from the start of value. A value
// that is not a tensor is ErrWrongType.
func DecodeHeader(value []byte) (Meta, error) {
	if len(value) < HeaderLen || string(value[:4]) != headerMagic {
		return Meta{}, fmt.Errorf("%w: the value is not a tensor", ErrWrongType)
	}
	h := value[:HeaderLen]
	if binary.LittleEndian.Uint32(h[headerSum:]) != crc32.Checksum(h[:headerSum], castagnoli) {
		return Meta{}, fmt.Errorf("%w: the value is not a tensor: its checksum differs", ErrWrongType)
	}
	m := Meta{
		DType: tensor.DType(h[4]), Gradient: h[6]&headerGradient != 0,
		Version: binary.LittleEndian.Uint64(h[8:]), Step: binary.LittleEndian.Uint64(h[16:]),
	}
	rank := int(h[5])
	if !m.DType.Valid() || rank > tensor.MaxRank || h[6]&^headerGradient != 0 || h[7] != 0 || m.Version>>63 != 0 || m.Step>>63 != 0 {
		return Meta{}, fmt.Errorf("%w: the value is not a tensor that this version knows", ErrWrongType)
	}
	m.Shape = make([]int, rank)
	for i := range tensor.MaxRank {
		d := binary.LittleEndian.Uint64(h[headerShape+8*i:])
		if i >= rank && d != 0 || d>>62 != 0 || uint64(int(d)) != d {
			return Meta{}, fmt.Errorf("%w: the value is not a tensor: dimension %d", ErrWrongType, d)
		}
		if i < rank {
			m.Shape[i] = int(d)
		}
	}
	if slices.ContainsFunc(h[headerReserved:headerSum], func(b byte) bool { return b != 0 }) {
		return Meta{}, fmt.Errorf("%w: the value is not a tensor that this version knows", ErrWrongType)
	}
	n, err := tensor.DataLen(m.DType, m.Shape)
	if err != nil {
		return Meta{}, fmt.Errorf("%w: the value is not a tensor: %w", ErrWrongType, err)
	}
	if n != len(value)-HeaderLen {
		return Meta{}, fmt.Errorf("%w: the value is not a tensor: %d bytes, not %d", ErrWrongType, len(value)-HeaderLen, n)
	}
	return m, nil
}

// HeaderVersion returns the version in a header that DecodeHeader has read.
func HeaderVersion(value []byte) uint64 { return binary.LittleEndian.Uint64(value[8:]) }
