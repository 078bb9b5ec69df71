package tensordb

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/tensor"
)

func TestHeaderGolden(t *testing.T) {
	m := Meta{DType: tensor.Float32, Shape: []int{2, 3}, Version: 0x0102030405060708, Step: 7, Gradient: true}
	b := make([]byte, HeaderLen+24)
	EncodeHeader(b, m)
	got := hex.EncodeToString(b[:HeaderLen])
	want := "53505431" + "01" + "02" + "01" + "00" + "0807060504030201" + "0700000000000000" + "0200000000000000" + "0300000000000000" + strings.Repeat("00", 6*8+27) + headerGoldenSum
	if got != want {
		t.Fatalf("the header is\n%s, not\n%s", got, want)
	}
	if back, err := DecodeHeader(b); err != nil || !reflect.DeepEqual(back, m) {
		t.Fatalf("read back as %v, %v", back, err)
	}
	for bit := range 8 * HeaderLen {
		c := bytes.Clone(b)
		c[bit/8] ^= 1 << (bit % 8)
		if _, err := DecodeHeader(c); !errors.Is(err, ErrWrongType) {
			t.Errorf("with bit %d flipped: %v", bit, err)
		}
	}
	for n := range len(b) {
		if _, err := DecodeHeader(b[:n]); !errors.Is(err, ErrWrongType) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

func FuzzDecodeHeader(f *testing.F) {
	b := make([]byte, HeaderLen+24)
	EncodeHeader(b, Meta{DType: tensor.Float32, Shape: []int{2, 3}, Version: 5})
	f.Add(b)
	f.Add([]byte("hello"))
	f.Fuzz(func(t *testing.T, value []byte) {
		m, err := DecodeHeader(value)
		if err != nil {
			if !errors.Is(err, ErrWrongType) {
				t.Fatal(err)
			}
			return
		}
		again := make([]byte, HeaderLen)
		EncodeHeader(again, m)
		if !bytes.Equal(again, value[:HeaderLen]) {
			t.Fatalf("%x became %x", value[:HeaderLen], again)
		}
	})
}

const headerGoldenSum = "4f87a7c9"
