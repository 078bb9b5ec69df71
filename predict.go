package spirt

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"image"
	"image/color"
	_ "image/jpeg" // decoders that Decode finds
	_ "image/png"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/image/draw"

	"github.com/spirt-ml/spirt/dataset"
)

// Invert says whether an image is inverted before it is classified.
type Invert string

// The values of Invert.
const (
	InvertAuto Invert = "auto" // where its border is bright and that of the training images is dark, or the other way round
	InvertYes  Invert = "yes"
	InvertNo   Invert = "no"
)

// Prediction is what a model says of an image.
type Prediction struct {
	Image         string    `json:"image"` // file, or index among the test samples
	Class         int       `json:"class"`
	Probability   float64   `json:"probability"`
	Probabilities []float64 `json:"probabilities"` // of each class
	Label         *int      `json:"label,omitempty"`
	Inverted      bool      `json:"inverted,omitempty"`
}

// Top returns the classes by falling probability, at most n.
func (p *Prediction) Top(n int) []int {
	classes := make([]int, len(p.Probabilities))
	for i := range classes {
		classes[i] = i
	}
	slices.SortStableFunc(classes, func(a, b int) int { return cmp.Compare(p.Probabilities[b], p.Probabilities[a]) })
	return classes[:min(n, len(classes))]
}

// Predictor classifies images with the model of a run.
type Predictor struct {
	trained *Trained
	data    *dataset.Dataset
	test    dataset.Range
	dark    bool // the border of the training images is dark
}

// OpenPredictor reads the model of a run folder, and the job's data.
func OpenPredictor(dir string) (*Predictor, error) {
	t, err := ReadModel(filepath.Join(dir, modelFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s has no model yet: it is written when a run ends (`spirt status %s`)", dir, dir)
	}
	if err != nil {
		return nil, err
	}
	job, _, err := loadJob(dir)
	if err != nil {
		return nil, err
	}
	p := &Predictor{trained: t}
	if p.data, err = dataset.Open(absoluteData(job.Data)); err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	spec := t.Model.Spec()
	if err := p.data.Fits(spec.Input, spec.Classes); err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	var train dataset.Range
	train, _, p.test = p.data.Split()
	first, _ := p.data.Rows(dataset.Range{Lo: train.Lo, Hi: min(train.Lo+100, train.Hi)})
	sum, n := 0, 0
	for at := 0; at < len(first); at += p.data.Stride() {
		s, k := border(first[at:at+p.data.Stride()], p.data.Shape)
		sum, n = sum+s, n+k
	}
	p.dark = sum < 128*n
	return p, nil
}

// border sums the outermost pixels of an image, and counts them.
func border(pixels []byte, shape []int) (sum, n int) {
	h, w := shape[1], shape[2]
	for i, v := range pixels {
		if y, x := i/w%h, i%w; y == 0 || x == 0 || y == h-1 || x == w-1 {
			sum, n = sum+int(v), n+1
		}
	}
	return sum, n
}

// Sample classifies a test sample by its index from 0.
func (p *Predictor) Sample(index int) (Prediction, error) {
	if index < 0 || index >= p.test.Len() {
		return Prediction{}, fmt.Errorf("sample %d: there are %d test samples, from 0 to %d", index, p.test.Len(), p.test.Len()-1)
	}
	pixels, labels := p.data.Rows(dataset.Range{Lo: p.test.Lo + index, Hi: p.test.Lo + index + 1})
	out := p.classify(pixels)
	label := int(labels[0])
	out.Image, out.Label = fmt.Sprint(index), &label
	return out, nil
}

// Limits of an image file.
const (
	maxImageFile   = 32 << 20 // bytes
	maxImagePixels = 64 << 20
	maxImageSide   = 1 << 15 // what scaling takes goes by the sides, not by the pixels
)

// File classifies a PNG or JPEG file, fitted into the model's input.
func (p *Predictor) File(path string, invert Invert) (Prediction, error) {
	b, err := readFile(path, maxImageFile)
	if err != nil {
		return Prediction{}, err
	}
	pixels, inverted, err := p.pixels(b, invert)
	if err != nil {
		return Prediction{}, fmt.Errorf("image %s: %w", path, err)
	}
	out := p.classify(pixels)
	out.Image, out.Inverted = path, inverted
	return out, nil
}

// pixels decodes an image into the bytes of a sample: its proportions kept, in
// the middle, on the colour of its border.
func (p *Predictor) pixels(file []byte, invert Invert) (pixels []byte, inverted bool, err error) {
	head, kind, err := image.DecodeConfig(bytes.NewReader(file))
	if err != nil {
		return nil, false, fmt.Errorf("it is no PNG or JPEG: %w", err)
	}
	if head.Width < 1 || head.Height < 1 || head.Width > maxImagePixels/head.Height {
		return nil, false, fmt.Errorf("%d x %d pixels: at most %d in all", head.Width, head.Height, maxImagePixels)
	}
	if head.Width > maxImageSide || head.Height > maxImageSide {
		return nil, false, fmt.Errorf("%d x %d pixels: at most %d on a side", head.Width, head.Height, maxImageSide)
	}
	src, _, err := image.Decode(bytes.NewReader(file))
	if err != nil {
		return nil, false, fmt.Errorf("the %s is damaged: %w", kind, err)
	}
	shape := p.data.Shape
	channels, height, width := shape[0], shape[1], shape[2]
	if channels != 1 && channels != 3 {
		return nil, false, fmt.Errorf("the model takes images of %d channels: only those with 1 or 3 can be made of a picture", channels)
	}
	at := src.Bounds()
	dst := image.NewRGBA(image.Rect(0, 0, width, height))
	draw.Draw(dst, dst.Bounds(), image.NewUniform(edge(src)), image.Point{}, draw.Src)
	scale := min(float64(width)/float64(at.Dx()), float64(height)/float64(at.Dy()))
	w, h := max(1, int(float64(at.Dx())*scale+.5)), max(1, int(float64(at.Dy())*scale+.5))
	x, y := (width-w)/2, (height-h)/2
	draw.CatmullRom.Scale(dst, image.Rect(x, y, x+w, y+h), src, at, draw.Over, nil)
	pixels = make([]byte, channels*height*width)
	for i := range height * width {
		c := dst.RGBAAt(i%width, i/width)
		if channels == 1 {
			pixels[i] = color.GrayModel.Convert(c).(color.Gray).Y
			continue
		}
		pixels[i], pixels[i+height*width], pixels[i+2*height*width] = c.R, c.G, c.B
	}
	sum, n := border(pixels, shape)
	inverted = invert == InvertYes || invert == InvertAuto && channels == 1 && (sum < 128*n) != p.dark
	if inverted {
		for i := range pixels {
			pixels[i] = 255 - pixels[i]
		}
	}
	return pixels, inverted, nil
}

// edge returns the mean colour of an image's corners.
func edge(src image.Image) color.Color {
	b := src.Bounds()
	var sum [3]uint32
	for _, p := range []image.Point{b.Min, {b.Max.X - 1, b.Min.Y}, {b.Min.X, b.Max.Y - 1}, b.Max.Sub(image.Pt(1, 1))} {
		c := color.NRGBAModel.Convert(src.At(p.X, p.Y)).(color.NRGBA)
		if c.A < 128 { // as if on white paper
			c = color.NRGBA{255, 255, 255, 255}
		}
		sum[0], sum[1], sum[2] = sum[0]+uint32(c.R), sum[1]+uint32(c.G), sum[2]+uint32(c.B)
	}
	return color.RGBA{uint8(sum[0] / 4), uint8(sum[1] / 4), uint8(sum[2] / 4), 255}
}

func (p *Predictor) classify(pixels []byte) Prediction {
	x := make([]float32, len(pixels))
	for i, b := range pixels {
		x[i] = float32(float32(b)*p.trained.Scale) + p.trained.Offset
	}
	out := Prediction{Probabilities: make([]float64, p.trained.Model.Spec().Classes)}
	p.trained.Model.Predict(out.Probabilities, p.trained.Parameters, x, p.trained.Model.NewWorkspace(1))
	out.Class = out.Top(1)[0]
	out.Probability = out.Probabilities[out.Class]
	return out
}
