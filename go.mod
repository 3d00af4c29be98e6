module github.com/sluicefs/sluice

go 1.26
