// Package tensor describes arrays of numbers and the bytes that carry them.
//
// A Tensor is an element type, a shape and the raw bytes, row-major and little
// endian, as they travel over sockets and lie in files. FromFloats, Floats and
// Bytes look at the same memory as numbers or as bytes, without a copy; a View
// names a part of one flat vector; WriteSafetensors and ReadSafetensors
// exchange named tensors with other programs.
//
// Nothing here is synchronised, and nothing here copies unless it says so.
// Every supported machine is little endian, which the package relies on.
package tensor

import (
	"fmt"
	"math"
	"unsafe"
)

// MaxRank is the largest number of dimensions that Validate accepts.
const MaxRank = 8

// DType is the type of a tensor's elements. The zero value is no type.
type DType uint8

// The element types. Their numbers stand in files: they never change.
const (
	Float32  DType = 1
	Uint8    DType = 2
	Int32    DType = 3
	Float16  DType = 4
	Float64  DType = 5
	BFloat16 DType = 6
	Int8     DType = 7
	Int16    DType = 8
	Int64    DType = 9
	Uint16   DType = 10
	Bool     DType = 11 // one byte, 0 or 1
)

// dtypes holds, by DType, our name, the name in safetensors files and the size
// in bytes.
var dtypes = [...]struct {
	name, safetensors string
	size              int
}{
	Float32:  {"float32", "F32", 4},
	Uint8:    {"uint8", "U8", 1},
	Int32:    {"int32", "I32", 4},
	Float16:  {"float16", "F16", 2},
	Float64:  {"float64", "F64", 8},
	BFloat16: {"bfloat16", "BF16", 2},
	Int8:     {"int8", "I8", 1},
	Int16:    {"int16", "I16", 2},
	Int64:    {"int64", "I64", 8},
	Uint16:   {"uint16", "U16", 2},
	Bool:     {"bool", "BOOL", 1},
}

// Valid reports whether d is one of the element types.
func (d DType) Valid() bool { return d != 0 && int(d) < len(dtypes) }

// String returns the name that ParseDType reads.
func (d DType) String() string {
	if !d.Valid() {
		return fmt.Sprintf("dtype(%d)", uint8(d))
	}
	return dtypes[d].name
}

// Size returns the bytes of one element, 0 for a type that is not valid.
func (d DType) Size() int {
	if !d.Valid() {
		return 0
	}
	return dtypes[d].size
}

// ParseDType returns the type with this name.
func ParseDType(name string) (DType, error) {
	for d, t := range dtypes {
		if d > 0 && t.name == name {
			return DType(d), nil
		}
	}
	return 0, fmt.Errorf("unknown element type %.32q: use float32, float64, float16, bfloat16, int8, int16, int32, int64, uint8, uint16 or bool", name)
}

// Tensor is an array of numbers: len(Data) is the product of Shape times the
// element size. A Tensor does not own its Data; whoever hands one out says how
// long the bytes stay valid.
type Tensor struct {
	DType DType
	Shape []int
	Data  []byte
}

// Validate reports what is wrong with t: an unknown type, too many or negative
// dimensions, or bytes that do not fit the shape.
func (t Tensor) Validate() error {
	want, err := DataLen(t.DType, t.Shape)
	if err != nil {
		return err
	}
	if want != len(t.Data) {
		return fmt.Errorf("a %v tensor of shape %v has %d bytes, not %d", t.DType, t.Shape, want, len(t.Data))
	}
	return nil
}

// Len returns the number of elements. The shape must be valid.
func (t Tensor) Len() int { return product(t.Shape) }

// DataLen returns how many bytes a tensor of this type and shape has, or an
// error if no tensor can have them.
func DataLen(d DType, shape []int) (int, error) {
	if !d.Valid() {
		return 0, fmt.Errorf("unknown element type %v", d)
	}
	if len(shape) > MaxRank {
		return 0, fmt.Errorf("a tensor has %d dimensions, at most %d are allowed", len(shape), MaxRank)
	}
	n, zero := d.Size(), false
	for i, dim := range shape {
		switch {
		case dim < 0:
			return 0, fmt.Errorf("dimension %d is negative: %d", i, dim)
		case dim == 0:
			zero = true
		case n > math.MaxInt/dim:
			return 0, fmt.Errorf("shape %v has more bytes than this machine can address", shape)
		default:
			n *= dim
		}
	}
	if zero {
		return 0, nil
	}
	return n, nil
}

// FromFloats returns a tensor over f, which it aliases. It panics if the shape
// has another number of elements.
func FromFloats(shape []int, f []float32) Tensor {
	if product(shape) != len(f) {
		panic("tensor: shape and length differ")
	}
	return Tensor{DType: Float32, Shape: shape, Data: Bytes(f)}
}

// Floats returns b as numbers, aliasing it. It panics if b is not a whole
// number of floats or does not start at a multiple of 4; memory from make and
// from the tensor database always does.
func Floats(b []byte) []float32 {
	if len(b)%4 != 0 {
		panic("tensor: bytes are not a whole number of floats")
	}
	if len(b) == 0 {
		return nil
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%4 != 0 {
		panic("tensor: floats must start at a multiple of 4 bytes")
	}
	return unsafe.Slice((*float32)(p), len(b)/4)
}

// Halves returns b as the bits of IEEE 754 binary16 numbers, aliasing it. It
// panics if b is not a whole number of them or does not start at a multiple of
// 2; memory from make and from the tensor database always does.
func Halves(b []byte) []uint16 {
	if len(b)%2 != 0 {
		panic("tensor: bytes are not a whole number of halves")
	}
	if len(b) == 0 {
		return nil
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%2 != 0 {
		panic("tensor: halves must start at a multiple of 2 bytes")
	}
	return unsafe.Slice((*uint16)(p), len(b)/2)
}

// Bytes returns f as its little-endian bytes, aliasing it.
func Bytes(f []float32) []byte {
	if len(f) == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(f))), 4*len(f))
}

// NonFinite returns the index of the first NaN or infinity of f, or -1.
func NonFinite(f []float32) int {
	// An exponent of all ones carries into the sign bit when one is added.
	const (
		exponent = 0x7f800000
		one      = 0x00800000
	)
	carry := func(x float32) uint32 { return math.Float32bits(x)&exponent + one }
	i := 0
	for ; i+8 <= len(f); i += 8 {
		b := (*[8]float32)(f[i:])
		c := carry(b[0]) | carry(b[1]) | carry(b[2]) | carry(b[3])
		d := carry(b[4]) | carry(b[5]) | carry(b[6]) | carry(b[7])
		if (c|d)>>31 != 0 {
			break
		}
	}
	for ; i < len(f); i++ {
		if math.Float32bits(f[i])&exponent == exponent {
			return i
		}
	}
	return -1
}

// NonFiniteHalf returns the index of the first NaN or infinity of h, or -1.
func NonFiniteHalf(h []uint16) int {
	const (
		exponent = 0x7c00
		one      = 0x0400
	)
	carry := func(x uint16) uint16 { return x&exponent + one }
	i := 0
	for ; i+8 <= len(h); i += 8 {
		b := (*[8]uint16)(h[i:])
		c := carry(b[0]) | carry(b[1]) | carry(b[2]) | carry(b[3])
		d := carry(b[4]) | carry(b[5]) | carry(b[6]) | carry(b[7])
		if (c|d)>>15 != 0 {
			break
		}
	}
	for ; i < len(h); i++ {
		if h[i]&exponent == exponent {
			return i
		}
	}
	return -1
}

// View is a named part of one flat float32 vector.
type View struct {
	Name   string
	Shape  []int
	Offset int // in floats
}

// Len returns the number of floats of the view.
func (v View) Len() int { return product(v.Shape) }

// Of returns the view's part of flat, aliasing it.
func (v View) Of(flat []float32) []float32 {
	return flat[v.Offset : v.Offset+v.Len() : v.Offset+v.Len()]
}

func product(shape []int) int {
	n := 1
	for _, d := range shape {
		n *= d
	}
	return n
}
