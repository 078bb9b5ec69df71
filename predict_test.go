package spirt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"math"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/image/draw"

	"github.com/spirt-ml/spirt/dataset"
)

// predictorOf trains a little and opens the result.
func predictorOf(t testing.TB) *Predictor {
	t.Helper()
	job := smallJob(40)
	job.BatchSize = 64
	dir := runOf(t, job)
	check(t, RunPeer(t.Context(), alone(dir)))
	p, err := OpenPredictor(dir)
	check(t, err)
	return p
}

// A picture of a test sample has the class of the sample: bright on dark and
// dark on bright, larger, wider, as PNG and JPEG.
func TestPredict(t *testing.T) {
	p := predictorOf(t)
	right := 0
	for i := range 30 {
		want, err := p.Sample(i)
		check(t, err)
		if *want.Label == want.Class {
			right++
		}
		sum := 0.0
		for _, v := range want.Probabilities {
			sum += v
		}
		if math.Abs(sum-1) > 1e-9 || want.Probability != want.Probabilities[want.Class] || want.Top(3)[0] != want.Class {
			t.Errorf("sample %d: %+v", i, want)
		}
		pixels, _ := p.data.Rows(dataset.Range{Lo: p.test.Lo + i, Hi: p.test.Lo + i + 1})
		grey := &image.Gray{Pix: pixels, Stride: 28, Rect: image.Rect(0, 0, 28, 28)}
		paper := image.NewRGBA(image.Rect(0, 0, 28, 28))
		for j, v := range pixels {
			paper.Set(j%28, j/28, color.Gray{255 - v})
		}
		large := image.NewGray(image.Rect(0, 0, 280, 280))
		draw.NearestNeighbor.Scale(large, large.Rect, grey, grey.Rect, draw.Src, nil)
		for name, img := range map[string]image.Image{"as it is": grey, "on paper": paper} {
			var file bytes.Buffer
			check(t, png.Encode(&file, img))
			got, inverted, err := p.pixels(file.Bytes(), InvertAuto)
			check(t, err)
			if !bytes.Equal(got, pixels) || inverted != (name == "on paper") {
				t.Errorf("sample %d, %s: other pixels, inverted %v", i, name, inverted)
			}
		}
		path := filepath.Join(t.TempDir(), "large.jpg")
		f, err := os.Create(path)
		check(t, err)
		check(t, jpeg.Encode(f, large, &jpeg.Options{Quality: 95}))
		check(t, f.Close())
		got, err := p.File(path, InvertAuto)
		check(t, err)
		if want.Probability > .8 && got.Class != want.Class {
			t.Errorf("sample %d: class %d (%.2f), large %d", i, want.Class, want.Probability, got.Class)
		}
	}
	if right < 20 {
		t.Errorf("%d of 30 right", right)
	}
	// A wide picture keeps its proportions.
	wide := image.NewGray(image.Rect(0, 0, 56, 14))
	for i := range wide.Pix {
		wide.Pix[i] = 255
	}
	var file bytes.Buffer
	check(t, png.Encode(&file, wide))
	got, _, err := p.pixels(file.Bytes(), InvertNo)
	check(t, err)
	if len(got) != 784 || got[14*28] != 255 {
		t.Errorf("%v", got[14*28:15*28])
	}
}

func TestPredictRefuses(t *testing.T) {
	p := predictorOf(t)
	for _, i := range []int{-1, 2000} {
		_, err := p.Sample(i)
		refused(t, err, "from 0 to 1999")
	}
	_, err := p.File(filepath.Join(t.TempDir(), "none"), InvertAuto)
	refused(t, err, "none")
	_, err = p.File(writeTemp(t, "x.png", "no picture"), InvertAuto)
	refused(t, err, "no PNG or JPEG")
	var file bytes.Buffer
	check(t, png.Encode(&file, image.NewGray(image.Rect(0, 0, 4, 4))))
	_, err = p.File(writeTemp(t, "x.png", file.String()[:file.Len()-20]), InvertAuto)
	refused(t, err, "damaged")
	for _, c := range []struct {
		width, height uint32
		says          string
	}{
		{100_000, 100_000, "100000 x 100000 pixels: at most 67108864 in all"},
		{1, 64 << 20, "1 x 67108864 pixels: at most 32768 on a side"},
		{maxImageSide + 1, 1, "on a side"},
	} {
		bomb := bytes.Clone(file.Bytes()) // the first chunk is bytes 8 to 33
		binary.BigEndian.PutUint32(bomb[16:], c.width)
		binary.BigEndian.PutUint32(bomb[20:], c.height)
		binary.BigEndian.PutUint32(bomb[29:], crc32.ChecksumIEEE(bomb[12:29]))
		_, err = p.File(writeTemp(t, "x.png", string(bomb)), InvertAuto)
		refused(t, err, c.says)
	}
	large := filepath.Join(t.TempDir(), "large.png")
	check(t, os.WriteFile(large, nil, 0o644))
	check(t, os.Truncate(large, maxImageFile+1))
	_, err = p.File(large, InvertAuto)
	refused(t, err, "large.png")
	_, err = OpenPredictor(runOf(t, smallJob(1)))
	refused(t, err, "no model yet")
}

// A model of colour images gets the planes one after the other, never inverted
// unless told to; one of other channels gets nothing.
func TestPredictColours(t *testing.T) {
	p := &Predictor{data: &dataset.Dataset{Shape: []int{3, 2, 2}}, dark: true}
	img := image.NewNRGBA(image.Rect(0, 0, 2, 2))
	for i, c := range []color.NRGBA{{255, 0, 0, 255}, {0, 255, 0, 255}, {0, 0, 255, 255}, {255, 255, 255, 255}} {
		img.SetNRGBA(i%2, i/2, c)
	}
	var file bytes.Buffer
	check(t, png.Encode(&file, img))
	want := []byte{255, 0, 0, 255, 0, 255, 0, 255, 0, 0, 255, 255}
	got, inverted, err := p.pixels(file.Bytes(), InvertAuto)
	if err != nil || inverted || !bytes.Equal(got, want) {
		t.Errorf("%v, inverted %v, %v", got, inverted, err)
	}
	got, inverted, err = p.pixels(file.Bytes(), InvertYes)
	if err != nil || !inverted || got[0] != 0 || got[1] != 255 {
		t.Errorf("%v, inverted %v, %v", got, inverted, err)
	}
	p.data.Shape = []int{2, 2, 2}
	_, _, err = p.pixels(file.Bytes(), InvertAuto)
	refused(t, err, "2 channels")
}

func FuzzPredictImage(f *testing.F) {
	p := predictorOf(f)
	for _, img := range []image.Image{image.NewGray(image.Rect(0, 0, 3, 2)), image.NewNRGBA(image.Rect(0, 0, 2, 5))} {
		var a, b bytes.Buffer
		check(f, png.Encode(&a, img))
		check(f, jpeg.Encode(&b, img, nil))
		f.Add(a.Bytes())
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		if head, _, err := image.DecodeConfig(bytes.NewReader(file)); err == nil && head.Width*head.Height > 1<<16 {
			return // slow, and bounded
		}
		pixels, _, err := p.pixels(file, InvertAuto)
		if err == nil && len(pixels) != 784 {
			t.Error(fmt.Sprint(len(pixels), " bytes"))
		}
	})
}
