package control

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// What /metrics says; docs/metrics.md explains it, and is held against this by a test.
var (
	descUp    = desc("up", "Whether the process that serves has answered.")
	descBuild = desc("build_info", "1, with the daemon's version.", "version")

	descRequests     = desc("requests_total", "FUSE requests.", "share", "op")
	descLatency      = desc("request_duration_seconds", "Time from a FUSE request's being fetched to its being answered.", "share", "op")
	descErrors       = desc("request_errors_total", "FUSE requests that were answered with an error.", "share", "op", "errno")
	descReadBytes    = desc("read_bytes_total", "Data of READ.", "share")
	descWrittenBytes = desc("written_bytes_total", "Data of WRITE.", "share")
	descFaults       = desc("faults_total", "What went wrong beside errors that the guest was answered with.", "share", "fault")

	descQueueDepth    = desc("queue_depth", "Requests of a virtqueue that are fetched and not completed.", "share", "queue")
	descQueueSize     = desc("queue_size", "Entries of a virtqueue, 0 while it is stopped.", "share", "queue")
	descKicks         = desc("queue_kicks_total", "Kicks by the guest.", "share", "queue")
	descNotifications = desc("queue_notifications_total", "Notifications of the guest.", "share", "queue")
	descPolls         = desc("queue_polls_total", "Looks at a virtqueue without a kick.", "share", "queue")
	descPollWindow    = desc("queue_poll_window_seconds", "How long a virtqueue's worker polls before it sleeps.", "share", "queue")
	descPollHits      = desc("queue_poll_hits_total", "Polls of a virtqueue that ended with a request.", "share", "queue")
	descPollMisses    = desc("queue_poll_misses_total", "Polls of a virtqueue in vain.", "share", "queue")
	descPollSeconds   = desc("queue_poll_seconds_total", "Time spent polling a virtqueue.", "share", "queue")

	descRelieved = desc("calls_relieved_total", "Calls that took so long that another thread has gone on with their queues.", "share")
	descSlowOps  = desc("slow_opcodes", "Opcodes whose calls have slept lately.", "share")
	descAvoided  = desc("slow_requests_total", "Requests of slow opcodes that went to other threads at once.", "share")

	descInodes     = desc("inodes", "Inodes that the guest knows.", "share")
	descInodeTiers = desc("inodes_by_tier", "Inodes by how they are found again.", "share", "tier")
	descFDs        = desc("fds", "File descriptors by what they are for.", "share", "tier")

	descSeccomp       = desc("seccomp_violations_total", "System calls outside the filter that were logged.")
	descGoroutines    = desc("server_goroutines", "Goroutines of the process that serves.")
	descThreads       = desc("server_threads", "Threads of the process that serves.")
	descHeap          = desc("server_heap_bytes", "Heap of the process that serves.")
	descServerOpenFDs = desc("server_open_fds", "File descriptors of the process that serves.")

	descWatches   = desc("event_watches", "Directories of the host under watch for a graft.", "share", "graft")
	descSent      = desc("events_sent_total", "Events of a graft that were sent.", "share", "graft")
	descRescans   = desc("events_rescans_total", "Events that were gathered into a rescan.", "share", "graft")
	descLimited   = desc("events_limited_total", "Events that were left out because of a limit of the graft.", "share", "graft")
	descOverflows = desc("events_overflows_total", "Overflows of the kernel's queue of events.", "share", "graft")
)

// Those of images, by graft.
var (
	descImages          = desc("images", "Images that a graft is made of.", "share", "graft")
	descImageSize       = desc("image_size_bytes", "Layers of a graft's images as their registry has them.", "share", "graft")
	descImageFetched    = desc("image_fetched_bytes", "What of the layers is here.", "share", "graft")
	descImageRequests   = desc("image_requests_total", "Requests for layers.", "share", "graft")
	descImageReceived   = desc("image_received_bytes_total", "Bytes of layers that came.", "share", "graft")
	descImageHits       = desc("image_cache_hits_total", "Chunks that were asked for and in the cache.", "share", "graft")
	descImageHitBytes   = desc("image_cache_hit_bytes_total", "Content of those chunks.", "share", "graft")
	descImageMisses     = desc("image_cache_misses_total", "Chunks that were asked for and not in the cache.", "share", "graft")
	descImageMissBytes  = desc("image_cache_miss_bytes_total", "Content of those chunks.", "share", "graft")
	descImageVerified   = desc("image_chunks_verified_total", "Chunks that came and were what they should be.", "share", "graft")
	descImageCorrupt    = desc("image_chunks_corrupt_total", "Chunks that came and were something else.", "share", "graft")
	descImageFetchError = desc("image_fetch_errors_total", "Attempts at a registry that came to nothing.", "share", "graft", "kind")
	descImageReadError  = desc("image_read_errors_total", "Chunks that were asked for and could not be had.", "share", "graft", "kind")
	descImageCache      = desc("image_cache_bytes", "What the cache takes, which other grafts may share.", "share", "graft")
	descImageBudget     = desc("image_cache_budget_bytes", "What the cache may take.", "share", "graft")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("sluice_"+name, help, labels, nil)
}

// ownMetrics are those of the server of the control API.
type ownMetrics struct {
	requests    *prometheus.CounterVec
	connections *prometheus.GaugeVec
	refused     *prometheus.CounterVec
	registry    *prometheus.Registry
}

func newOwnMetrics() *ownMetrics {
	m := &ownMetrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_control_requests_total", Help: "Requests to the control API.",
		}, []string{"operation", "status"}),
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "sluice_control_connections", Help: "Connections to the control API.",
		}, []string{"listener"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_control_connections_refused_total", Help: "Connections to the control API that were one too many, or of a guest that may not connect.",
		}, []string{"listener"}),
		registry: prometheus.NewRegistry(),
	}
	m.registry.MustRegister(m.requests, m.connections, m.refused,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// getMetrics asks the daemon here and not in a Collector, which has no context and whose panic would be the process's.
func getMetrics(c *call) error {
	var s snapshot
	stats, err := c.server.cfg.Daemon.Stats(c.Context())
	if err == nil {
		var info api.Info
		info, err = c.server.cfg.Daemon.Info(c.Context())
		s = snapshot{up: true, version: info.Version, stats: c.allow().showStats(stats), whole: c.allow() == nil}
	}
	if err != nil {
		c.peer.log.Error("metrics are incomplete", "error", err)
		s = snapshot{}
	}
	reg := prometheus.NewRegistry()
	if err := reg.Register(s); err != nil {
		return err
	}
	all := prometheus.Gatherers{reg}
	if c.allow() == nil {
		all = append(all, c.server.own.registry)
	}
	promhttp.HandlerFor(all, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, ErrorLog: metricsLog{c.peer.log}}).ServeHTTP(c.w, c.Request)
	return nil
}

// A metricsLog is what promhttp says, in the log.
type metricsLog struct{ log *ratelog.Logger }

func (l metricsLog) Println(v ...any) {
	l.log.Error("metrics are incomplete", "error", fmt.Sprint(v...))
}

// A snapshot is what a daemon answered, as a prometheus.Collector.
type snapshot struct {
	up      bool
	version string
	stats   api.Stats
	whole   bool // with what is of no one share
}

// Describe implements prometheus.Collector: what there is depends on the answer.
func (s snapshot) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s snapshot) Collect(ch chan<- prometheus.Metric) {
	if !s.up {
		gauge(ch, descUp, 0)
		return
	}
	gauge(ch, descUp, 1)
	gauge(ch, descBuild, 1, s.version)
	for i := range s.stats.Shares {
		collectShare(ch, &s.stats.Shares[i])
	}
	for _, e := range s.stats.Events {
		gauge(ch, descWatches, float64(e.Watches), e.Tag, e.Path)
		counter(ch, descSent, e.Sent, e.Tag, e.Path)
		counter(ch, descRescans, e.Rescans, e.Tag, e.Path)
		counter(ch, descLimited, e.Limited, e.Tag, e.Path)
		counter(ch, descOverflows, e.Overflows, e.Tag, e.Path)
	}
	for i := range s.stats.Images {
		collectImages(ch, &s.stats.Images[i], s.whole)
	}
	if s.whole {
		counter(ch, descSeccomp, s.stats.SeccompViolations)
		gauge(ch, descGoroutines, float64(s.stats.Goroutines))
		gauge(ch, descThreads, float64(s.stats.Threads))
		gauge(ch, descHeap, float64(s.stats.HeapBytes))
		gauge(ch, descServerOpenFDs, float64(s.stats.OpenFDs))
	}
}

func collectImages(ch chan<- prometheus.Metric, i *api.ImageStats, whole bool) {
	gauge(ch, descImages, float64(i.Images), i.Tag, i.Path)
	gauge(ch, descImageSize, float64(i.Size), i.Tag, i.Path)
	gauge(ch, descImageFetched, float64(i.Fetched), i.Tag, i.Path)
	counter(ch, descImageRequests, i.Requests, i.Tag, i.Path)
	counter(ch, descImageReceived, i.Bytes, i.Tag, i.Path)
	counter(ch, descImageHits, i.Hits, i.Tag, i.Path)
	counter(ch, descImageHitBytes, i.HitBytes, i.Tag, i.Path)
	counter(ch, descImageMisses, i.Misses, i.Tag, i.Path)
	counter(ch, descImageMissBytes, i.MissBytes, i.Tag, i.Path)
	counter(ch, descImageVerified, i.Verified, i.Tag, i.Path)
	counter(ch, descImageCorrupt, i.Corrupt, i.Tag, i.Path)
	for kind, n := range i.FetchErrors {
		counter(ch, descImageFetchError, n, i.Tag, i.Path, kind)
	}
	for kind, n := range i.ReadErrors {
		counter(ch, descImageReadError, n, i.Tag, i.Path, kind)
	}
	if whole {
		gauge(ch, descImageCache, float64(i.CacheBytes), i.Tag, i.Path)
		gauge(ch, descImageBudget, float64(i.CacheBudget), i.Tag, i.Path)
	}
}

func collectShare(ch chan<- prometheus.Metric, s *api.ShareStats) {
	for _, op := range s.Ops {
		counter(ch, descRequests, op.Count, s.Tag, op.Op)
		histogram(ch, op, s.Tag)
		for errno, n := range op.Errors {
			counter(ch, descErrors, n, s.Tag, op.Op, errno)
		}
	}
	counter(ch, descReadBytes, s.BytesRead, s.Tag)
	counter(ch, descWrittenBytes, s.BytesWritten, s.Tag)
	for fault, n := range s.Faults {
		counter(ch, descFaults, n, s.Tag, fault)
	}
	for _, q := range s.Queues {
		queue := strconv.Itoa(q.Index)
		gauge(ch, descQueueDepth, float64(q.Depth), s.Tag, queue)
		gauge(ch, descQueueSize, float64(q.Size), s.Tag, queue)
		counter(ch, descKicks, q.Kicks, s.Tag, queue)
		counter(ch, descNotifications, q.Notifications, s.Tag, queue)
		counter(ch, descPolls, q.Polls, s.Tag, queue)
		gauge(ch, descPollWindow, float64(q.PollWindow)/1e9, s.Tag, queue)
		counter(ch, descPollHits, q.PollHits, s.Tag, queue)
		counter(ch, descPollMisses, q.PollMisses, s.Tag, queue)
		seconds(ch, descPollSeconds, q.PollNanoseconds, s.Tag, queue)
	}
	counter(ch, descRelieved, s.Relieved, s.Tag)
	gauge(ch, descSlowOps, float64(s.SlowOps), s.Tag)
	counter(ch, descAvoided, s.Avoided, s.Tag)
	gauge(ch, descInodes, float64(s.Inodes), s.Tag)
	for tier, n := range s.InodeTiers {
		gauge(ch, descInodeTiers, float64(n), s.Tag, tier)
	}
	for tier, n := range s.FDs {
		gauge(ch, descFDs, float64(n), s.Tag, tier)
	}
}

// histogram sends an opcode's latencies. Its count is the sum of the buckets, not op.Count, which is read at another moment.
func histogram(ch chan<- prometheus.Metric, op api.OpStats, tag string) {
	buckets := make(map[float64]uint64, len(api.LatencyBounds))
	var count uint64
	for i, n := range op.Latency {
		count += n
		if i < len(api.LatencyBounds) {
			buckets[time.Duration(api.LatencyBounds[i]).Seconds()] = count
		}
	}
	m, err := prometheus.NewConstHistogram(descLatency, count, time.Duration(op.Nanoseconds).Seconds(), buckets, tag, op.Op)
	send(ch, descLatency, m, err)
}

func gauge(ch chan<- prometheus.Metric, d *prometheus.Desc, value float64, labels ...string) {
	m, err := prometheus.NewConstMetric(d, prometheus.GaugeValue, value, labels...)
	send(ch, d, m, err)
}

// seconds is counter for a sum of nanoseconds.
func seconds(ch chan<- prometheus.Metric, d *prometheus.Desc, nanoseconds uint64, labels ...string) {
	m, err := prometheus.NewConstMetric(d, prometheus.CounterValue, float64(nanoseconds)/1e9, labels...)
	send(ch, d, m, err)
}

func counter(ch chan<- prometheus.Metric, d *prometheus.Desc, value uint64, labels ...string) {
	m, err := prometheus.NewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
	send(ch, d, m, err)
}

// send sends a metric, or that it cannot be one: a label that is not UTF-8 spoils itself and no other.
func send(ch chan<- prometheus.Metric, d *prometheus.Desc, m prometheus.Metric, err error) {
	if err != nil {
		m = prometheus.NewInvalidMetric(d, err)
	}
	ch <- m
}

// countRequest counts a request that was answered.
func (m *ownMetrics) countRequest(r *route, status int) {
	operation := "none"
	if r != nil {
		operation = r.operation
	}
	if status == 0 {
		status = http.StatusOK
	}
	m.requests.WithLabelValues(operation, strconv.Itoa(status)).Inc()
}
