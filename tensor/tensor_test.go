package tensor

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestValidate(t *testing.T) {
	good := []Tensor{
		{Float32, []int{2, 3}, make([]byte, 24)},
		{Uint8, nil, make([]byte, 1)},
		{Int32, []int{5, 0, 7}, nil},
		FromFloats([]int{4}, make([]float32, 4)),
	}
	for _, x := range good {
		if err := x.Validate(); err != nil {
			t.Errorf("%v %v: %v", x.DType, x.Shape, err)
		}
	}
	for want, x := range map[string]Tensor{
		"dtype(0)":         {},
		"dtype(12)":        {DType: 12},
		"24 bytes, not 23": {Float32, []int{2, 3}, make([]byte, 23)},
		"negative":         {Float32, []int{-1, -4}, make([]byte, 16)},
		"9 dimensions":     {Uint8, make([]int, 9), nil},
		"address":          {Float32, []int{math.MaxInt, 4}, nil},
	} {
		if err := x.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v %v: %v, want %q", x.DType, x.Shape, err, want)
		}
	}
	for d := Float32; d.Valid(); d++ {
		if back, err := ParseDType(d.String()); err != nil || back != d {
			t.Errorf("%v comes back as %v, %v", d, back, err)
		}
	}
	if _, err := ParseDType("complex64"); err == nil {
		t.Error("complex64 accepted")
	}
}

func TestFloatsAndBytesAlias(t *testing.T) {
	f := []float32{1, 2, 3}
	b := Bytes(f)
	binary.LittleEndian.PutUint32(b[4:], math.Float32bits(7))
	if f[1] != 7 || &Floats(b)[0] != &f[0] {
		t.Fatal("bytes and floats are not the same memory")
	}
	for _, bad := range [][]byte{b[:5], b[1:9]} {
		func() {
			defer func() {
				if recover() == nil {
					t.Error("Floats accepts bytes that are not floats")
				}
			}()
			Floats(bad)
		}()
		func() {
			defer func() {
				if recover() == nil {
					t.Error("Halves accepts bytes that are not halves")
				}
			}()
			Halves(bad)
		}()
	}
	if h := Halves(b[:6]); len(h) != 3 || h[0] != 0 || h[1] != 0x3f80 {
		t.Errorf("the halves of %x are %x", b[:6], h)
	}
	view := View{Name: "v", Shape: []int{2, 1}, Offset: 1}
	if got := view.Of(f); view.Len() != 2 || &got[0] != &f[1] || cap(got) != 2 {
		t.Fatalf("view %v", got)
	}
}

func TestNonFinite(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	inf := float32(math.Inf(1))
	for range 300 {
		f := make([]float32, rng.IntN(300))
		for i := range f {
			f[i] = [...]float32{math.MaxFloat32, -math.MaxFloat32, 0, 1e-45, -1}[rng.IntN(5)]
		}
		want := -1
		for range rng.IntN(3) {
			if len(f) > 0 {
				i := rng.IntN(len(f))
				f[i] = [...]float32{inf, -inf, inf - inf, math.Float32frombits(0x7f800001)}[rng.IntN(4)]
				if want < 0 || i < want {
					want = i
				}
			}
		}
		if got := NonFinite(f); got != want {
			t.Fatalf("length %d: %d, want %d", len(f), got, want)
		}
	}
}

func TestNonFiniteHalf(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		h := make([]uint16, rng.IntN(60))
		for i := range h {
			h[i] = [...]uint16{0x7bff, 0xfbff, 0, 0x8000, 1, 0x3c00}[rng.IntN(6)]
		}
		want := -1
		for range rng.IntN(3) {
			if len(h) > 0 {
				i := rng.IntN(len(h))
				h[i] = [...]uint16{0x7c00, 0xfc00, 0x7e00, 0xfc01}[rng.IntN(4)]
				if want < 0 || i < want {
					want = i
				}
			}
		}
		if got := NonFiniteHalf(h); got != want {
			t.Fatalf("length %d: %d, want %d", len(h), got, want)
		}
	}
}

func example() ([]Named, map[string]string) {
	return []Named{
		{"labels", Tensor{Uint8, []int{3}, []byte{1, 2, 3}}},
		{"conv1.weight", FromFloats([]int{2, 3}, []float32{1, -2, 3, 4, 5, 6.5})},
		{"empty", Tensor{Float32, []int{0, 4}, nil}},
		{"scalar \"ü\"", Tensor{Int32, []int{}, []byte{7, 0, 0, 0}}},
	}, map[string]string{"model": `{"name":"lenet5"}`, "b": "ä"}
}

func TestSafetensorsRoundTrip(t *testing.T) {
	tensors, metadata := example()
	var file bytes.Buffer
	if err := WriteSafetensors(&file, tensors, metadata); err != nil {
		t.Fatal(err)
	}
	golden, err := os.ReadFile("testdata/golden.safetensors")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(golden, file.Bytes()) {
		t.Fatalf("the bytes written changed: %q", file.Bytes())
	}
	back, meta, err := ReadSafetensors(bytes.NewReader(file.Bytes()), int64(file.Len()))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(meta, metadata) || len(back) != len(tensors) {
		t.Fatalf("metadata %v, %d tensors", meta, len(back))
	}
	for _, want := range tensors {
		i := slices.IndexFunc(back, func(n Named) bool { return n.Name == want.Name })
		if i < 0 || back[i].DType != want.DType || !slices.Equal(back[i].Shape, want.Shape) || !bytes.Equal(back[i].Data, want.Data) {
			t.Errorf("%q comes back as %+v", want.Name, back)
		}
	}
	// Any cut of the file is an error.
	for n := range file.Len() {
		if _, _, err := ReadSafetensors(bytes.NewReader(file.Bytes()[:n]), int64(n)); err == nil {
			t.Fatalf("the first %d bytes are accepted", n)
		}
		if _, _, err := ReadSafetensors(bytes.NewReader(file.Bytes()[:n]), int64(file.Len())); err == nil {
			t.Fatalf("%d bytes that claim to be more are accepted", n)
		}
	}
}

func TestReadSafetensorsRefuses(t *testing.T) {
	const entry = `{"dtype":"F32","shape":[1],"data_offsets":[0,4]}`
	for header, want := range map[string]string{
		`[]`:       "does not start with {",
		` {}`:      "does not start with {",
		`{"a":1}`:  "expected",
		`{"a":{}}`: "missing",
		`{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}`:                    "not supported",
		`{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}`:                    "out of range",
		`{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}`:                   "out of range",
		`{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}`:                       "two numbers",
		`{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}`:                     "needs 4 bytes",
		`{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}`:                     "needs 8 bytes",
		`{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}`:               "unknown field",
		`{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}`:                      "hole",
		`{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}`:                      "truncated or too long",
		`{"a":` + entry + `,"a":` + entry + `}`:                                      "twice",
		`{"a":` + entry + `,"b":` + entry + `}`:                                      "overlap",
		`{"__metadata__":{"k":1},"a":` + entry + `}`:                                 "not a string",
		`{"a":` + entry + `} x`:                                                      "after the JSON",
		`{"a":` + entry:                                                              "EOF",
		`{"` + "\xff" + `":` + entry + `}`:                                           "UTF-8",
		`{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}`: "",
	} {
		file := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
		file = append(append(file, header...), 0, 0, 0, 0)
		_, _, err := ReadSafetensors(bytes.NewReader(file), int64(len(file)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", header, err, want)
		}
	}
	huge := binary.LittleEndian.AppendUint64(nil, math.MaxUint64)
	if _, _, err := ReadSafetensors(bytes.NewReader(append(huge, '{')), 9); err == nil {
		t.Error("a header of 2^64-1 bytes is accepted")
	}
}

func TestWriteSafetensorsRefuses(t *testing.T) {
	x := FromFloats([]int{1}, []float32{1})
	for _, bad := range [][]Named{
		{{"a", x}, {"a", x}}, {{"__metadata__", x}}, {{"\xff", x}}, {{"a", Tensor{Float32, []int{2}, nil}}},
	} {
		if err := WriteSafetensors(io.Discard, bad, nil); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

func FuzzReadSafetensors(f *testing.F) {
	tensors, metadata := example()
	var file bytes.Buffer
	if err := WriteSafetensors(&file, tensors, metadata); err != nil {
		f.Fatal(err)
	}
	f.Add(file.Bytes())
	f.Add([]byte("\x02\x00\x00\x00\x00\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, file []byte) {
		tensors, metadata, err := ReadSafetensors(bytes.NewReader(file), int64(len(file)))
		if err != nil {
			return
		}
		// What was read can be written and read again.
		var again bytes.Buffer
		if err := WriteSafetensors(&again, tensors, metadata); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ReadSafetensors(bytes.NewReader(again.Bytes()), int64(again.Len())); err != nil {
			t.Fatal(err)
		}
		for _, n := range tensors {
			if n.DType == Float32 {
				Floats(n.Data)
			}
		}
	})
}

func BenchmarkNonFinite(b *testing.B) {
	f := make([]float32, 1<<20)
	b.SetBytes(int64(4 * len(f)))
	for b.Loop() {
		if NonFinite(f) >= 0 {
			b.Fatal("found one")
		}
	}
}
