package chart

import (
	"bytes"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"math"
	"strconv"

	"golang.org/x/image/font"
	"golang.org/x/image/font/gofont/gobold"
	"golang.org/x/image/font/gofont/goregular"
	"golang.org/x/image/font/opentype"
	"golang.org/x/image/math/fixed"
	"golang.org/x/image/vector"
)

const (
	dashOn  = 7 // pixels
	dashOff = 5
	// Scale is how many pixels of the PNG are one of the SVG, on each axis.
	Scale = 2
)

// PNG returns the chart as pixels on white paper, Scale times as large as the
// SVG.
func (c *Chart) PNG() ([]byte, error) {
	f, err := newFonts(Scale)
	if err != nil {
		return nil, err
	}
	size := image.Rect(0, 0, width*Scale, int(math.Ceil(c.height(f.width)*Scale)))
	p := &pixels{img: image.NewRGBA(size), fonts: f}
	c.draw(p, f.width)
	var b bytes.Buffer
	if err := png.Encode(&b, p.img); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// fonts makes faces as they are needed.
type fonts struct {
	regular, bold *opentype.Font
	scale         float64
	faces         map[faceKey]font.Face
}

type faceKey struct {
	size float64
	bold bool
}

func newFonts(scale float64) (*fonts, error) {
	regular, err := opentype.Parse(goregular.TTF)
	if err != nil {
		return nil, err
	}
	bold, err := opentype.Parse(gobold.TTF)
	if err != nil {
		return nil, err
	}
	return &fonts{regular, bold, scale, map[faceKey]font.Face{}}, nil
}

// face returns a face, nil if there is none.
func (f *fonts) face(size float64, bold bool) font.Face {
	k := faceKey{size, bold}
	if face, ok := f.faces[k]; ok {
		return face
	}
	from := f.regular
	if bold {
		from = f.bold
	}
	face, err := opentype.NewFace(from, &opentype.FaceOptions{Size: size * f.scale, DPI: 72, Hinting: font.HintingNone})
	if err != nil {
		return nil // the sizes are ours: there is a face for each
	}
	f.faces[k] = face
	return face
}

// width is a measure, in pixels before scaling.
func (f *fonts) width(s string, size float64, bold bool) float64 {
	face := f.face(size, bold)
	if face == nil {
		return size * float64(len(s)) / 2
	}
	return float64(font.MeasureString(face, s)) / 64 / f.scale
}

type pixels struct {
	img   *image.RGBA
	fonts *fonts
}

// rgba returns the colour of an ink on white paper.
func (i ink) rgba() color.RGBA {
	_, hex, _ := i.role()
	v, err := strconv.ParseUint(hex[1:], 16, 32)
	if err != nil {
		return color.RGBA{A: 255}
	}
	return color.RGBA{uint8(v >> 16), uint8(v >> 8), uint8(v), 255}
}

func (p *pixels) fill(at point, w, h float64, in ink) {
	r := image.Rect(int(at.x*Scale), int(at.y*Scale), int(math.Ceil((at.x+w)*Scale)), int(math.Ceil((at.y+h)*Scale)))
	draw.Draw(p.img, r, image.NewUniform(in.rgba()), image.Point{}, draw.Src)
}

// paint draws what outline adds to a path that lies between two corners.
func (p *pixels) paint(low, high point, c color.Color, outline func(z *vector.Rasterizer, from point)) {
	r := image.Rect(int(math.Floor(low.x))-1, int(math.Floor(low.y))-1, int(math.Ceil(high.x))+1, int(math.Ceil(high.y))+1).Intersect(p.img.Bounds())
	if r.Empty() {
		return
	}
	z := vector.NewRasterizer(r.Dx(), r.Dy())
	outline(z, point{float64(r.Min.X), float64(r.Min.Y)})
	z.Draw(p.img, r, image.NewUniform(c), image.Point{})
}

func (p *pixels) line(pts []point, width float64, in ink, faint, dashed bool) {
	c := in.rgba()
	var paint color.Color = c
	if faint {
		paint = color.NRGBA{c.R, c.G, c.B, 90}
	}
	lines := [][]point{pts}
	if dashed {
		lines = dashes(pts)
	}
	radius := width * Scale / 2
	low, high := bounds(pts)
	low, high = point{low.x*Scale - radius, low.y*Scale - radius}, point{high.x*Scale + radius, high.y*Scale + radius}
	p.paint(low, high, paint, func(z *vector.Rasterizer, from point) {
		for _, line := range lines {
			stroke(z, line, radius, from)
		}
	})
}

// bounds returns the corners of the rectangle around points.
func bounds(pts []point) (low, high point) {
	low, high = point{math.Inf(1), math.Inf(1)}, point{math.Inf(-1), math.Inf(-1)}
	for _, a := range pts {
		low, high = point{min(low.x, a.x), min(low.y, a.y)}, point{max(high.x, a.x), max(high.y, a.y)}
	}
	return low, high
}

// stroke adds the outline of a line with round joints. All its parts turn the
// same way, so that they add up where they overlap.
func stroke(z *vector.Rasterizer, pts []point, radius float64, from point) {
	for i := range pts {
		b := point{pts[i].x*Scale - from.x, pts[i].y*Scale - from.y}
		if i > 0 {
			a := point{pts[i-1].x*Scale - from.x, pts[i-1].y*Scale - from.y}
			dx, dy := b.x-a.x, b.y-a.y
			if length := math.Hypot(dx, dy); length > 0 {
				nx, ny := -dy/length*radius, dx/length*radius
				move(z, a.x-nx, a.y-ny)
				to(z, b.x-nx, b.y-ny)
				to(z, b.x+nx, b.y+ny)
				to(z, a.x+nx, a.y+ny)
				z.ClosePath()
			}
		}
		if i > 0 && i < len(pts)-1 && radius > 1 {
			circle(z, b, radius)
		}
	}
}

func (p *pixels) dot(at point, radius float64, in ink) {
	c, r := point{at.x * Scale, at.y * Scale}, radius*Scale
	p.paint(point{c.x - r, c.y - r}, point{c.x + r, c.y + r}, in.rgba(), func(z *vector.Rasterizer, from point) {
		circle(z, point{c.x - from.x, c.y - from.y}, r)
	})
}

func circle(z *vector.Rasterizer, c point, r float64) {
	const k = 0.5522847498 // of a cubic curve that is a quarter of a circle
	cube := func(ax, ay, bx, by, x, y float64) {
		z.CubeTo(float32(c.x+ax*r), float32(c.y+ay*r), float32(c.x+bx*r), float32(c.y+by*r), float32(c.x+x*r), float32(c.y+y*r))
	}
	move(z, c.x+r, c.y)
	cube(1, k, k, 1, 0, 1)
	cube(-k, 1, -1, k, -1, 0)
	cube(-1, -k, -k, -1, 0, -1)
	cube(k, -1, 1, -k, 1, 0)
	z.ClosePath()
}

func move(z *vector.Rasterizer, x, y float64) { z.MoveTo(float32(x), float32(y)) }
func to(z *vector.Rasterizer, x, y float64)   { z.LineTo(float32(x), float32(y)) }

// dashes cuts a line into dashes.
func dashes(pts []point) [][]point {
	var all [][]point
	left, on := float64(dashOn), true
	current := pts[:1:1]
	for i := 1; i < len(pts); i++ {
		a, b := pts[i-1], pts[i]
		length := math.Hypot(b.x-a.x, b.y-a.y)
		done := 0.0
		for length-done > left {
			done += left
			at := point{a.x + (b.x-a.x)*done/length, a.y + (b.y-a.y)*done/length}
			if on {
				all = append(all, append(current, at))
			}
			if on = !on; on {
				left = dashOn
			} else {
				left = dashOff
			}
			current = []point{at}
		}
		left -= length - done
		current = append(current, b)
	}
	if on {
		all = append(all, current)
	}
	return all
}

func (p *pixels) text(at point, s string, size float64, bold bool, to align, in ink) {
	face := p.fonts.face(size, bold)
	if face == nil {
		return
	}
	x := at.x
	switch w := p.fonts.width(s, size, bold); to {
	case middle:
		x -= w / 2
	case right:
		x -= w
	}
	d := font.Drawer{Dst: p.img, Src: image.NewUniform(in.rgba()), Face: face,
		Dot: fixed.Point26_6{X: fixed.Int26_6(x * Scale * 64), Y: fixed.Int26_6(at.y * Scale * 64)}}
	d.DrawString(s)
}
