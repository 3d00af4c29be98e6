package report

import (
	"bytes"
	"fmt"
	"image/color"
	"io"
	"math"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Chart is a picture of some of a report.
type Chart struct {
	File      string // the name it should have
	condition string
	title     string
	axis      string
	base      float64 // the value that bars start from
	workloads []string
	series    []series
}

// series are the bars of one colour, one for each workload.
type series struct {
	name   string
	values []Summary // a zero one is a gap
}

// Charts returns the charts of a report: for each condition the subject's CPU time as a ratio to all others', and everybody's
// latencies and times, as far as they were measured.
func (r *Report) Charts() []Chart {
	var all []Chart
	for _, condition := range r.Conditions {
		ratios := Chart{
			File: condition.Name + "-cpu.svg", condition: condition.Name, base: 1,
			title: fmt.Sprintf("%s: CPU time per operation, %s ÷ others", condition.Name, r.subject()),
			axis:  "below 1: " + r.subject() + " takes less", workloads: r.workloadsOf(key{condition: condition.Name, metric: CPU}),
		}
		for _, peer := range r.peers() {
			ratios.add("÷ "+peer, func(workload string) (Summary, bool) {
				return r.ratio(key{workload, condition.Name, r.subject(), CPU}, peer)
			})
		}
		for _, c := range []Chart{
			ratios,
			r.valueChart(condition.Name, P50, "latency", "median latency", "µs", 1e3),
			r.valueChart(condition.Name, Time, "time", "time", "ms", 1e6),
		} {
			if len(c.series) > 0 {
				all = append(all, c)
			}
		}
	}
	return all
}

// valueChart is the chart of a metric of all servers, divided by scale.
func (r *Report) valueChart(condition, metric, file, title, unit string, scale float64) Chart {
	c := Chart{
		File: condition + "-" + file + ".svg", condition: condition, title: condition + ": " + title,
		axis: unit + ", less is better", workloads: r.workloadsOf(key{condition: condition, metric: metric}),
	}
	for _, server := range r.Servers {
		c.add(server.Name, func(workload string) (Summary, bool) {
			s, ok := r.value(key{workload, condition, server.Name, metric})
			return Summary{s.Median / scale, s.Low / scale, s.High / scale, s.N}, ok
		})
	}
	c.base = math.Pow(10, math.Floor(math.Log10(c.least())))
	return c
}

// add adds a series of bars, unless it has none.
func (c *Chart) add(name string, value func(workload string) (Summary, bool)) {
	s := series{name: name}
	found := false
	for _, workload := range c.workloads {
		v, ok := value(workload)
		found = found || ok
		s.values = append(s.values, v)
	}
	if found {
		c.series = append(c.series, s)
	}
}

// least is the smallest value of all bars, 1 if there are none.
func (c *Chart) least() float64 {
	least := math.Inf(1)
	for _, s := range c.series {
		for _, v := range s.values {
			if v.Median > 0 {
				least = min(least, v.Median)
			}
		}
	}
	if math.IsInf(least, 1) {
		return 1
	}
	return least
}

// colours that the colour-blind tell apart too (Okabe and Ito's).
var colours = []color.RGBA{{0, 114, 178, 255}, {230, 159, 0, 255}, {0, 158, 115, 255}, {204, 121, 167, 255}, {86, 180, 233, 255}, {213, 94, 0, 255}}

// WriteSVG draws the chart. Its scale is logarithmic: half as much and twice as much are equally far from the same.
func (c *Chart) WriteSVG(w io.Writer) error {
	p := plot.New()
	p.Title.Text, p.Y.Label.Text = c.title, c.axis
	p.Title.Padding, p.Y.Padding, p.Y.Tick.Length = vg.Points(8), vg.Points(4), vg.Points(4)
	p.NominalX(c.workloads...)
	p.X.Tick.Label.Rotation = math.Pi / 6
	p.X.Tick.Label.XAlign, p.X.Tick.Label.YAlign = draw.XRight, draw.YTop
	p.Y.Tick.Marker = logTicks{}
	p.Legend.Top, p.Legend.Left, p.Legend.Padding = true, true, vg.Points(3)
	p.Legend.XOffs, p.Legend.ThumbnailWidth = vg.Points(8), vg.Points(14)
	for _, style := range []*text.Style{&p.Title.TextStyle, &p.X.Tick.Label, &p.Y.Label.TextStyle, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		style.Font.Variant = "Sans"
		style.Font.Size = vg.Points(11)
	}
	grid := plotter.NewGrid()
	grid.Vertical.Width, grid.Horizontal.Color = 0, color.Gray{220}
	p.Add(grid)
	for i, s := range c.series {
		b := bars{c, s, i, colours[i%len(colours)]}
		p.Add(b)
		p.Legend.Add(s.name, b)
	}
	p.Add(plotter.NewFunction(func(float64) float64 { return math.Log2(c.base) }))
	const height, lineHeight = 360, 16
	// Room for the legend above the bars, and for a bar that ends at the bottom.
	p.Y.Max += (p.Y.Max - p.Y.Min) * float64(len(c.series)+1) * lineHeight / (height - 120)
	p.Y.Min -= (p.Y.Max - p.Y.Min) * 0.02
	p.X.Min, p.X.Max = -0.6, float64(len(c.workloads))-0.4
	width := vg.Points(max(420, 110+float64(len(c.workloads))*(16+13*float64(len(c.series)))))
	canvas := vgsvg.New(width, vg.Points(height))
	p.Draw(draw.Crop(draw.New(canvas), vg.Points(8), vg.Points(-12), vg.Points(8), vg.Points(-8)))
	var svg bytes.Buffer
	if _, err := canvas.WriteTo(&svg); err != nil {
		return err
	}
	// Names of fonts of the same widths, for machines that do not have the one that the text was laid out for.
	_, err := w.Write(bytes.ReplaceAll(svg.Bytes(), []byte("font-family:Liberation Sans"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif")))
	return err
}

// bars draws a series. Heights are binary logarithms of values.
type bars struct {
	chart  *Chart
	series series
	index  int
	fill   color.RGBA
}

// span is where the bar of a workload lies on the horizontal axis.
func (b bars) span(workload int) (left, right float64) {
	width := 0.8 / float64(len(b.chart.series))
	left = float64(workload) - 0.4 + width*float64(b.index)
	return left + width*0.06, left + width*0.94
}

// Plot implements plot.Plotter.
func (b bars) Plot(canvas draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&canvas)
	base := y(math.Log2(b.chart.base))
	for i, v := range b.series.values {
		if v.Median <= 0 {
			continue
		}
		left, right := b.span(i)
		top := y(math.Log2(v.Median))
		canvas.FillPolygon(b.fill, []vg.Point{{X: x(left), Y: base}, {X: x(left), Y: top}, {X: x(right), Y: top}, {X: x(right), Y: base}})
		if v.interval() == "" || v.Low <= 0 {
			continue
		}
		middle := x((left + right) / 2)
		whisker := []vg.Point{{X: middle, Y: y(math.Log2(v.Low))}, {X: middle, Y: y(math.Log2(v.High))}}
		canvas.StrokeLine2(draw.LineStyle{Color: color.Gray{60}, Width: vg.Points(0.8)}, whisker[0].X, whisker[0].Y, whisker[1].X, whisker[1].Y)
	}
}

// DataRange implements plot.DataRanger.
func (b bars) DataRange() (xmin, xmax, ymin, ymax float64) {
	ymin, ymax = math.Log2(b.chart.base), math.Log2(b.chart.base)
	for _, v := range b.series.values {
		if v.Median <= 0 {
			continue
		}
		ymin, ymax = min(ymin, math.Log2(v.Median)), max(ymax, math.Log2(v.Median))
		if v.interval() != "" && v.Low > 0 {
			ymin, ymax = min(ymin, math.Log2(v.Low)), max(ymax, math.Log2(v.High))
		}
	}
	return 0, float64(len(b.series.values) - 1), ymin, ymax
}

// Thumbnail implements plot.Thumbnailer.
func (b bars) Thumbnail(c *draw.Canvas) {
	c.FillPolygon(b.fill, []vg.Point{c.Min, {X: c.Min.X, Y: c.Max.Y}, c.Max, {X: c.Max.X, Y: c.Min.Y}})
}

// logTicks labels an axis of binary logarithms with powers of two where the range is short, else with powers of ten.
type logTicks struct{}

// Ticks implements plot.Ticker.
func (logTicks) Ticks(low, high float64) []plot.Tick {
	base, label := 2.0, func(e int) string {
		if e < 0 {
			return "1/" + strconv.Itoa(1<<-e)
		}
		return strconv.Itoa(1 << e)
	}
	if high-low > 8 {
		base, label = 10, func(e int) string { return strconv.FormatFloat(math.Pow10(e), 'f', -1, 64) }
	}
	unit := math.Log2(base)
	var ticks []plot.Tick
	for e := int(math.Ceil(low / unit)); float64(e)*unit <= high; e++ {
		ticks = append(ticks, plot.Tick{Value: float64(e) * unit, Label: label(e)})
	}
	return ticks
}
